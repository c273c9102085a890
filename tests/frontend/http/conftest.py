import contextlib
import ssl

import httpx2
import openai
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_api.receiving import InProgress
from moe_api.supervision import Supervisor
from moe_frontend.chat.renderer import Renderer
from moe_frontend.http.app import Api
from moe_frontend.http.bodies import Bodies
from moe_frontend.http.server import HttpServer


class Http:
    """OpenAI's API of a bench's frontend, and clients of it."""

    def __init__(self, bench, reader):
        self.bench = bench
        self.reader = InMemoryMetricReader()
        edge, self.renderer = bench.edge, Renderer()
        api = Api(
            bench.forwarder,
            bench.tracer,
            lambda: bench.frontend.ready,
            reader,
            self.renderer,
            edge.authenticator,
        )
        self.gate = api.gated(MeterProvider([self.reader]).get_meter("test"), bench.log)
        self.supervisor = Supervisor()
        self.server = HttpServer(self.gate, self.supervisor, tls=edge.tls and edge.tls.http)

    async def start(self):
        self.port = await self.server.start("127.0.0.1:0")
        authority = self.bench.authority
        self.url = f"{'https' if authority else 'http'}://127.0.0.1:{self.port}"
        trusted = ssl.create_default_context(cadata=authority.certificate.decode()) if authority else True
        self.client = httpx2.AsyncClient(base_url=self.url, timeout=30, verify=trusted)
        self.openai = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    async def complete(self, prompt, **fields):
        return await self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def metrics(self, name):
        """Data points of a metric."""
        found = self.reader.get_metrics_data()
        scopes = found.resource_metrics[0].scope_metrics if found else ()
        return [p for scope in scopes for m in scope.metrics if m.name == name for p in m.data.data_points]

    async def close(self):
        await self.client.aclose()
        await self.openai.close()
        await self.server.drain(0)
        await self.renderer.close()
        await self.supervisor.close()


@pytest.fixture
async def http(bench):
    """`await http(workers=2)` gives a running Http."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(workers=2, in_progress=None, limit_s=600.0, **options):
            in_progress = in_progress or InProgress()
            reader = Bodies(limit_s, in_progress)
            running = Http(await bench(workers, in_progress=in_progress, **options), reader)
            await running.start()
            stack.push_async_callback(running.close)
            return running

        yield start
