"""The edge without an engine process: what it does when the engine ends, refuses or talks nonsense."""

import asyncio
import gc
import logging
import os
import queue
import socket
import weakref
from concurrent.futures import Future
from dataclasses import replace

import grpc
import pytest

from moe_api import rich_status
from moe_api.clock import Anchor
from moe_api.supervision import Supervisor
from moe_worker import framing
from moe_worker.engine.requests import Delta, FinishReason, Load, Request
from moe_worker.engine.statistics import ExpertStatistics, Statistics
from moe_worker.errors import EngineDiedError, QueueFullError
from moe_worker.sampling.guides import Guide, _Unguided
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service import answers, engine_process, wire
from moe_worker.service.engine_client import EngineClient
from moe_worker.service.preparing import Preparing
from moe_worker.service.servicers import _failure
from moe_worker.service.streams import Stream, Timeline

MOST = 3


class Process:
    """Stands in for the engine's process."""

    def __init__(self):
        self.returncode = None
        self.ended = asyncio.Event()

    def kill(self):
        self.returncode = -9
        self.ended.set()

    async def wait(self):
        await self.ended.wait()
        return self.returncode


class Engine:
    """The test's end of the socket."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def say(self, message):
        self.writer.write(wire.encode(message))

    async def hear(self):
        size = int.from_bytes(await self.reader.readexactly(framing.LENGTH_BYTES), "big")
        return wire.decode(await self.reader.readexactly(size))

    def stepped(self, submitted, *deltas):
        self.say(wire.Stepped(1, 2, deltas, Load(), submitted, Statistics()))


@pytest.fixture
async def connected():
    ours, theirs = socket.socketpair()
    client = EngineClient(Process(), *await asyncio.open_unix_connection(sock=ours), most_requests=MOST)
    engine, supervisor = Engine(*await asyncio.open_unix_connection(sock=theirs)), Supervisor()
    yield client, engine, supervisor
    await supervisor.close()
    client.writer.close()
    engine.writer.close()


def request(number, prompt=(1, 2)):
    return Request(number, prompt, SamplingParameters(), 5)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_request_between_the_engines_death_and_draining_fails_at_once(connected):
    client, engine, supervisor = connected
    before = client.submit(request(client.admit()))
    engine.writer.close()
    client.process.kill()
    error = await asyncio.wait_for(client.run(supervisor), 60)
    assert isinstance(error, EngineDiedError)
    with pytest.raises(EngineDiedError):
        await before.take()
    for attempt in (client.admit, lambda: client.submit(request(7))):
        with pytest.raises(EngineDiedError):
            attempt()
    with pytest.raises(EngineDiedError):
        await client.expert_statistics()


async def test_an_engine_that_talks_nonsense_is_killed_and_its_streams_fail(connected, caplog):
    client, engine, supervisor = connected
    stream = client.submit(request(client.admit()))
    engine.writer.write((3).to_bytes(4, "big") + b"\xff??")
    error = await asyncio.wait_for(client.run(supervisor), 60)
    assert "malformed message" in str(error)
    assert client.process.returncode == -9
    with pytest.raises(EngineDiedError):
        await stream.take()


async def test_requests_that_the_engine_has_not_taken_hold_places_when_cancelled(connected):
    """Otherwise calls that are reset at once would fill the engine's memory while it computes a long step."""
    client, engine, supervisor = connected
    running = asyncio.create_task(client.run(supervisor))
    for _ in range(MOST):
        number = client.admit()
        client.submit(request(number))
        client.close(number)
    with pytest.raises(QueueFullError):
        client.admit()
    engine.stepped(MOST)
    await until(lambda: client.current_load.queued == 0)
    client.close(client.admit())
    running.cancel()


async def test_one_tenant_cannot_take_all_places(connected):
    client, _, _ = connected
    client.most_requests = 16
    for _ in range(14):
        client.admit("crowd")
    with pytest.raises(QueueFullError, match="14 of its requests are active, 14 of all tenants"):
        client.admit("crowd")
    numbers = [client.admit("guest"), client.admit("third")]
    with pytest.raises(QueueFullError, match="the queue is full"):
        client.admit("guest")
    for number in numbers:
        client.close(number)
    client.admit()


async def test_a_finished_text_that_nobody_reads_counts_as_load(connected):
    client, engine, supervisor = connected
    running = asyncio.create_task(client.run(supervisor))
    number = client.admit()
    client.submit(request(number))
    engine.stepped(1, Delta(number, "x", 7, FinishReason.LENGTH))
    await until(lambda: client.current_load.running == 1)
    client.close(number)
    assert client.current_load.running == 0
    running.cancel()


async def test_experts_are_asked_for_once_at_a_time(connected):
    client, engine, supervisor = connected
    running = asyncio.create_task(client.run(supervisor))
    asking = [asyncio.create_task(client.expert_statistics()) for _ in range(100)]
    assert await asyncio.wait_for(engine.hear(), 60) == wire.AskExperts()
    asking[0].cancel()
    engine.say(wire.ExpertReport(ExpertStatistics(5)))
    answers_ = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 60)
    assert [it.steps for it in answers_[1:]] == [5] * 99
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.hear(), 0.1)
    running.cancel()


async def test_a_report_of_experts_may_come_when_streams_have_been_handed_off(connected):
    client, engine, supervisor = connected
    running = asyncio.create_task(client.run(supervisor))
    asking = asyncio.create_task(client.expert_statistics())
    assert await asyncio.wait_for(engine.hear(), 60) == wire.AskExperts()
    client.abandon(EngineDiedError("this worker stops"))
    with pytest.raises(EngineDiedError, match="this worker stops"):
        await asyncio.wait_for(asking, 60)
    engine.say(wire.ExpertReport(ExpertStatistics(5)))
    engine.say(wire.Stepped(1, 2, (), Load(queued=3), 0, Statistics()))
    await until(lambda: running.done() or client.load.queued == 3)
    assert not running.done()
    running.cancel()


async def test_what_the_engine_refuses_ends_that_stream_alone(connected):
    client, engine, supervisor = connected
    running = asyncio.create_task(client.run(supervisor))
    one, other = client.admit(), client.admit()
    refused, served = client.submit(request(one)), client.submit(request(other))
    engine.say(wire.Refused(one, "the queue is full", retryable=True))
    engine.stepped(2, Delta(other, "x", 7, FinishReason.LENGTH))
    with pytest.raises(QueueFullError) as error:
        await asyncio.wait_for(refused.take(), 60)
    assert answers.of_error(error.value).code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert (await asyncio.wait_for(served.take(), 60)).tokens == (7,)
    running.cancel()


class Core:
    """Takes one request and is full then."""

    idle = True

    def __init__(self):
        self.taken = []

    def open_guide(self, asked):
        return None if asked.output_format is None else Guide(Future(), _Unguided(b""))

    def submit(self, taken, guide=None):
        if self.taken:
            raise QueueFullError("the queue is full", 1.0)
        self.taken.append(taken.id)

    def cancel(self, number):
        pass


class Sent(list):
    send = list.append


def test_a_request_that_cannot_be_taken_does_not_end_the_engine():
    core, inbox, sent = Core(), queue.SimpleQueue(), Sent()
    for number in (1, 2):
        inbox.put(wire.Submit(request(number)))
    assert engine_process._take_commands(core, inbox, sent, Preparing(inbox.put)) == 2
    assert core.taken == [1]
    assert sent == [wire.Refused(2, "the queue is full", retryable=True)]


@pytest.mark.parametrize("outcome", ["compiled", "broken", "cancelled"])
def test_requests_do_not_wait_for_the_output_format_of_another(outcome):
    guides, inbox, sent = {}, queue.SimpleQueue(), Sent()
    core, preparing = Core(), Preparing(inbox.put)
    core.open_guide = lambda asked: guides.setdefault(asked.id, Core.open_guide(core, asked))
    core.submit = lambda taken, guide: core.taken.append((taken.id, guide))
    slow = replace(request(1), output_format=OutputFormat("json_object"))
    for message in (wire.Submit(slow), wire.Submit(request(2))):
        inbox.put(message)
    assert engine_process._take_commands(core, inbox, sent, preparing) == 1
    assert core.taken == [(2, None)]
    if outcome == "cancelled":
        inbox.put(wire.Cancel(1))
    elif outcome == "broken":
        guides[1].matcher.set_exception(ValueError("secret"))
    else:
        guides[1].matcher.set_result("a matcher")
    counted = engine_process._take_commands(core, inbox, sent, preparing)
    assert counted == 1, "the edge counts it as not taken until then"
    assert core.taken[1:] == ([(1, guides[1])] if outcome == "compiled" else [])
    assert [(it.id, it.retryable) for it in sent] == ([(1, False)] if outcome == "broken" else [])


def test_memory_of_a_compiled_format_waits_for_no_garbage_collection():
    """They are rare in an engine, and clients choose the formats."""
    inbox = queue.SimpleQueue()
    preparing, slow = Preparing(inbox.put), replace(request(1), output_format=OutputFormat("json_object"))
    guide = Core.open_guide(Core(), slow)
    freed = weakref.ref(guide)
    gc.disable()
    try:
        preparing.start(slow, guide)
        guide.matcher.set_result("a matcher")
        assert preparing.take(inbox.get()) is guide
        del guide
        assert freed() is None
    finally:
        gc.enable()


def test_a_failure_about_a_name_that_is_no_text_reaches_the_edge():
    frame = wire.encode(engine_process._failed("\ud800.safetensors is missing", 2))
    assert wire.decode(frame[framing.LENGTH_BYTES :]) == wire.Failed(r"\ud800.safetensors is missing", 2)


def test_a_malformed_frame_ends_the_engine_instead_of_its_receiver_alone():
    ours, theirs = socket.socketpair()
    ours.sendall((2).to_bytes(4, "big") + b"\xfe\xff")
    child = os.fork()
    if child == 0:
        try:
            logging.disable()
            engine_process._receive(theirs, queue.SimpleQueue(), [])
        finally:
            os._exit(9)  # never goes on with the tests of its parent
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize(
    ("reason", "error", "status"),
    [
        (FinishReason.FAILED, grpc.aio.AbortError(), "INTERNAL"),
        (FinishReason.FAILED, asyncio.CancelledError(), "INTERNAL"),
        (FinishReason.DEADLINE, grpc.aio.AbortError(), "DEADLINE_EXCEEDED"),
        (None, asyncio.CancelledError(), "CANCELLED"),
        (None, EngineDiedError("gone"), "UNAVAILABLE"),
        (FinishReason.LENGTH, asyncio.CancelledError(), None),
    ],
)
def test_a_failure_is_recorded_as_what_it_was(reason, error, status):
    stream = Stream(Timeline(Anchor(0, 0), submitted_ns=0, finish_reason=reason))
    assert _failure(error, stream, None) == status


def test_only_a_death_says_that_the_engine_died():
    assert rich_status.reason(answers.of_error(EngineDiedError("gone"))) == rich_status.ENGINE_DIED
    assert rich_status.reason(answers.of_error(QueueFullError("full", 1.0))) == ""
