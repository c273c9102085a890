import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moe_api import transport
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.supervision import Supervisor
from moe_frontend import edges
from moe_frontend.chat.renderer import Renderer
from moe_frontend.discovery.connecting import Connector
from moe_frontend.discovery.endpoints import Endpoint
from moe_frontend.identity.audit import AuditLog
from moe_frontend.outputs.cache import OutputCache
from moe_frontend.outputs.store import Store
from moe_frontend.policy.tenants import parse
from moe_frontend.rpc.chat import ChatService
from moe_frontend.transport import failures, metadata
from moe_frontend.transport.admission import Admission
from moe_frontend.transport.forwarding import Forwarder
from moe_frontend.transport.holding import Hold
from moe_frontend.transport.replicas import Replicas
from moe_frontend.transport.service import Frontend
from tests.frontend.fake_worker import FakeWorker

MOE_FRONTEND = Path(sys.executable).with_name("moe-frontend")
FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


class Bench:
    """A frontend on loopback with real workers behind it, and a client."""

    def __init__(
        self,
        hold_s,
        patience_s,
        from_zero,
        keys=metadata.DEFAULT_KEYS,
        write_timeout_s=600.0,  # only the tests of this limit reach it
        output_cache=0,
        revision="",
        policy=None,
        guards=None,
        authority=None,
        tenants="",
        in_progress=None,
    ):
        self.revision = revision
        self.supervisor = Supervisor()
        self.edge = edges.edge_of(guards or edges.Guards(), self.supervisor)
        self.authority = authority
        self.audited = []
        self.log = AuditLog(lambda line: self.audited.append(json.loads(line)))
        self.store = Store(output_cache, 3600.0)
        self.outputs = None
        if output_cache:
            self.outputs = OutputCache(self.store, self.supervisor, failures.stopped())
        self.spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.tracer = provider.get_tracer("test")
        internal = self.edge.internal
        self.replicas = Replicas(policy=policy, connector=Connector(internal and internal.pair))
        if internal is not None:
            internal.on_renewal(self.replicas.reconnect)
        self.hold = Hold(hold_s, "demo", from_zero)
        self.forwarder = Forwarder(
            self.replicas, self.tracer, self.hold, patience_s, keys, write_timeout_s, self.outputs
        )
        self.forwarder.limit(Admission(parse(tenants)))
        self.frontend = Frontend(
            self.forwarder,
            self.hold,
            authenticator=self.edge.authenticator,
            log=self.log,
            in_progress=in_progress,
        )
        self.renderer = Renderer()
        self.frontend.add(
            ChatService(self.forwarder, self.renderer, self.tracer, self.frontend.serve).register
        )
        self.workers = []
        self.processes = {}
        self.extra = frozenset()
        self.address = None
        self.channel = None

    async def start(self, workers, credentials=None):
        """credentials: of the workers' servers, where they serve TLS."""
        tls = self.edge.tls
        port = await self.frontend.start("127.0.0.1:0", tls and tls.grpc)
        self.address = f"127.0.0.1:{port}"
        self.channel = self.connect(self.authority)
        for i in range(workers):
            self.workers.append(FakeWorker(f"w-{i}", self.revision))
            await self.workers[-1].start(credentials=credentials)
        await self.publish()

    def connect(self, authority=None):
        """A channel to the frontend, over TLS if there is an authority."""
        # Without a pool of its own a channel shares the connections of others.
        options = (*transport.CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        if authority is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        credentials = grpc.ssl_channel_credentials(authority.certificate)
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    async def publish(self):
        ready = frozenset(w.endpoint for w in self.workers) | self.extra
        self.replicas.update(ready)
        if self.outputs is not None:
            self.outputs.serve(frozenset(endpoint.revision for endpoint in ready))
        await self.frontend.set_ready(ready=len(ready) > 0)

    async def add_process(self, name, revision="", most=math.inf):
        """A worker in a process of its own, to be killed.

        most: messages of each stream after which it stops: none ends before the worker is killed.
        """
        environment = {**os.environ, "MOE_WORKER_REVISION": revision, "FAKE_WORKER_MOST": str(most)}
        command = [sys.executable, FAKE_WORKER, name]
        process = await asyncio.to_thread(
            subprocess.Popen, command, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.processes[name] = process
        address = (await asyncio.to_thread(process.stdout.readline)).strip()
        self.extra |= {Endpoint(name, address, revision)}
        await self.publish()
        return process

    @property
    def stub(self):
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    def generate(self, prompt, **options):
        return self.stub.Generate(inference_pb2.GenerateRequest(prompt=prompt), **options)

    async def text(self, prompt, **options):
        return "".join([r.text async for r in self.generate(prompt, **options)])

    def worker(self, name):
        return next(w for w in self.workers if w.name == name)

    async def close(self):
        await self.channel.close()
        await self.frontend.drain(0)
        await self.renderer.close()
        await self.replicas.close()
        await self.supervisor.close()
        for worker in self.workers:
            await worker.server.stop(None)
        for process in self.processes.values():
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture
async def bench():
    """`await bench(workers=2)` gives a running Bench."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(workers=2, hold_s=0.0, patience_s=2.0, from_zero=False, credentials=None, **options):
            running = Bench(hold_s, patience_s, from_zero, **options)
            await running.start(workers, credentials)
            stack.push_async_callback(running.close)
            return running

        yield start


async def _until_serving(address):
    async with asyncio.timeout(60), grpc.aio.insecure_channel(address) as channel:
        async for update in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            if update.status == health_pb2.HealthCheckResponse.SERVING:
                return


@pytest.fixture
async def command():
    """`await command(*args)` starts `moe-frontend`: (process, address). `command.http` is of HTTP."""
    processes = []

    async def start(*args, env=None, stdout=False):
        process = await asyncio.create_subprocess_exec(
            MOE_FRONTEND,
            "--listen",
            "127.0.0.1:0",
            *args,
            stdout=subprocess.PIPE if stdout else None,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        processes.append(process)
        while line := (await process.stderr.readline()).decode():
            if "serving HTTP on" in line:
                start.http = line.split()[-1]
            if "serving on" in line:
                await _until_serving(line.split()[-1])
                return process, line.split()[-1]
        raise AssertionError(f"moe-frontend ended with {await process.wait()}")

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
