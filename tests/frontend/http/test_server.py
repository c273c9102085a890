"""The port of OpenAI's API: what it says of itself, and how it ends."""

import asyncio
import contextlib
import dataclasses
import json
import math
import re
import signal

import httpx2
import pytest

from moe_frontend.discovery.endpoints import Served
from moe_operator.errors import InstallationError
from tests.frontend.fake_worker import FakeWorker
from tests.frontend.http.test_completions import events


async def test_the_model_is_listed(http):
    h = await http(workers=1)
    (model,) = (await h.openai.models.list()).data
    assert (model.id, model.object, model.owned_by) == ("m", "model", "moe-operator")
    assert model.max_model_len == 4096
    assert (await h.openai.models.retrieve("m")).id == "m"
    h.bench.replicas.update(frozenset())
    assert (await h.openai.models.list()).data[0].id == "m"  # as of the last replica


async def test_a_model_that_nobody_serves_yet_is_not_known(http):
    h = await http(workers=0)
    response = await h.client.get("/v1/models")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


async def test_a_checkpoints_own_temperature_holds_where_none_is_asked_for(http):
    h = await http(workers=1)
    assert "temperature: 1" in (await h.complete("echo")).json()["choices"][0]["text"]
    endpoint = next(iter(h.bench.replicas.endpoints()))
    own = dataclasses.replace(endpoint, served=Served("m", 9, samples=True))
    h.bench.replicas.update(frozenset({own}))
    assert "temperature" not in (await h.complete("echo")).json()["choices"][0]["text"]


async def test_health_is_readiness(http):
    h = await http(workers=1)
    assert (await h.client.get("/health")).status_code == 200
    await h.bench.frontend.set_ready(ready=False)
    while (await h.client.get("/health")).status_code != 503:
        await asyncio.sleep(0.05)
    assert set((await h.client.get("/version")).json()) == {"version"}


async def test_streams_finish_and_new_requests_are_refused_while_it_drains(http):
    h = await http(workers=1)
    stream = asyncio.create_task(h.complete("count 10 0.1", stream=True))
    await h.bench.workers[0].until(lambda worker: worker.sent >= 2)
    draining = asyncio.create_task(h.server.drain(20))
    await asyncio.sleep(0)
    with contextlib.suppress(httpx2.TransportError):  # after the port is closed
        while response := await h.complete("count 1"):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
    assert len(events((await stream).text)) == 12
    await draining


async def test_what_still_runs_at_the_end_of_the_grace_is_told_so(http):
    h = await http(workers=1)
    begun = asyncio.create_task(h.complete("hold", stream=True))
    silent = asyncio.create_task(h.complete("silent"))
    await h.bench.workers[0].until(lambda worker: worker.running == 2 and worker.sent == 1)
    await h.server.drain(0.3)
    first, error, done = events((await begun).text)
    assert json.loads(first)["choices"][0]["text"] == "first "
    assert json.loads(error)["error"]["message"].startswith("this frontend is shutting down")
    assert done == "[DONE]"
    assert (await silent).status_code == 503


async def test_a_port_that_is_taken_is_said_in_a_sentence(http):
    h = await http(workers=0)
    with pytest.raises(InstallationError, match=r"cannot listen on .* for HTTP: Address already in use"):
        await h.server.start(f"127.0.0.1:{h.port}")


async def test_the_command_serves_both_and_drains_on_sigterm(command):
    worker = FakeWorker("w", most=1)
    endpoint = await worker.start()
    process, _ = await command("--static", endpoint.address, "--http", "127.0.0.1:0")
    url = f"http://{command.http}"
    async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.05)
        stream = asyncio.create_task(
            client.post("/v1/completions", json={"prompt": "count 5", "stream": True})
        )
        await worker.until(lambda w: w.sent >= 1)
        scraped = (await client.get("/metrics")).text
        assert re.search(r'http_server_active_requests{http_request_method="POST".* 1\.0\n', scraped)
        assert "moe_frontend_requests_held" in scraped
        process.send_signal(signal.SIGTERM)
        await worker.allow(math.inf)
        assert len(events((await stream).text)) == 7
    assert await process.wait() == 0
    await worker.server.stop(None)
