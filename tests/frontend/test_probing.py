"""The prober against real servers: it goes by what workers say of themselves."""

import asyncio

import pytest

from moe_api.supervision import Backoff, Supervisor
from moe_frontend.discovery import probing
from moe_frontend.discovery.endpoints import Endpoint
from moe_frontend.discovery.probing import Prober
from tests.frontend.fake_worker import FakeWorker


class Probed:
    def __init__(self):
        self.published = asyncio.Queue()
        self.supervisor = Supervisor(backoff=Backoff(first_s=0.01))
        self.prober = Prober(lambda: self.published.put_nowait(self.prober.serving), self.supervisor)

    async def until(self, *wanted):
        async with asyncio.timeout(60):
            while {(e.name, e.revision) for e in await self.published.get()} != set(wanted):
                pass


@pytest.fixture
async def probed():
    running = Probed()
    yield running
    await running.prober.close()


async def test_a_worker_is_published_while_it_takes_requests_and_no_longer(probed):
    worker = FakeWorker("w", "r1")
    where = Endpoint("w", (await worker.start()).address)
    probed.prober.update(frozenset({where}))
    await probed.until(("w", "r1"))
    await worker.health.set_ready(ready=False)
    await probed.until()
    await worker.health.set_ready(ready=True)
    await probed.until(("w", "r1"))
    await worker.server.stop(None)
    await probed.until()
    again = FakeWorker("w", "r2")
    await again.start(where.address)
    await probed.until(("w", "r2"))
    probed.prober.update(frozenset())
    await probed.until()
    await again.server.stop(None)


async def test_one_that_does_not_answer_delays_nobody(probed):
    worker = FakeWorker("w")
    where = await worker.start()
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    address = "{}:{}".format(*silent.sockets[0].getsockname())
    probed.prober.update(frozenset({Endpoint("silent", address), where, Endpoint("gone", "127.0.0.1:1")}))
    await probed.until(("w", ""))
    await worker.server.stop(None)
    silent.close()


async def test_a_worker_with_impossible_names_is_not_used(probed, caplog):
    lying, worker = FakeWorker("w", "r" * 300), FakeWorker("x", "r1")
    probed.prober.update(frozenset({await lying.start(), await worker.start()}))
    await probed.until(("x", "r1"))
    async with asyncio.timeout(60):
        while "w is not used: GetModel returns names" not in caplog.text:
            await asyncio.sleep(0.01)
    assert {endpoint.name for endpoint in probed.prober.serving} == {"x"}
    for each in (lying, worker):
        await each.server.stop(None)


async def test_a_watch_that_ends_unexpectedly_begins_again(probed, monkeypatch):
    worker = FakeWorker("w")
    where = await worker.start()
    real, failures = probing._with_model, iter([ValueError("a bug"), asyncio.CancelledError()])

    async def failing(channel, endpoint):
        if (error := next(failures, None)) is not None:
            raise error
        return await real(channel, endpoint)

    monkeypatch.setattr(probing, "_with_model", failing)
    probed.prober.update(frozenset({where}))
    await probed.until(("w", ""))
    (state,) = probed.supervisor.states
    assert (state.loop, state.name, state.failures) == ("worker-health", "w", 2)
    await worker.server.stop(None)
