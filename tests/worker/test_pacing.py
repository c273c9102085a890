import asyncio

import pytest

from moe_api.clock import Anchor
from moe_worker.engine.requests import Delta, FinishReason
from moe_worker.service.pacing import EACH, Pacing
from moe_worker.service.streams import Stream, Timeline


async def settled():
    """All that is ready in the loop has run."""
    for _ in range(10):
        await asyncio.sleep(0)


class Streams:
    """Streams that share a pacing, whose pauses end when the test says so, and what their clients got."""

    def __init__(self, count):
        self.paused = []
        pacing = Pacing(self.paused.append)
        self.streams = [Stream(Timeline(Anchor(0, 0), submitted_ns=0), pacing) for _ in range(count)]
        self.got = [[] for _ in range(count)]
        self.reasons = [[] for _ in range(count)]
        self.tasks = [asyncio.create_task(self._read(number)) for number in range(count)]

    async def _read(self, number):
        while True:
            chunk = await self.streams[number].take()
            self.got[number].append(chunk.tokens)
            self.reasons[number].append(chunk.finish_reason)
            if chunk.finish_reason is not None:
                return

    async def push(self, token, streams=None, reason=None):
        for stream in self.streams if streams is None else streams:
            stream.push(Delta(1, "", token, reason), 1)
        await settled()

    async def end_pause(self):
        self.paused.pop()()
        await settled()


async def test_streams_beyond_a_round_wait_for_their_turn_and_gather_tokens():
    all_ = Streams(2 * EACH)
    await all_.push(0)
    assert all_.got == [[(0,)]] * (2 * EACH)  # the first token waits for nobody
    await all_.push(1)
    await all_.push(2)
    assert all_.got == [[(0,), (1,)]] * EACH + [[(0,)]] * EACH
    await all_.end_pause()
    assert all_.got == [[(0,), (1,)]] * EACH + [[(0,), (1, 2)]] * EACH
    await all_.end_pause()
    assert all_.got == [[(0,), (1,), (2,)]] * EACH + [[(0,), (1, 2)]] * EACH
    await all_.push(3, reason=FinishReason.LENGTH)
    await asyncio.gather(*all_.tasks)
    assert all_.got == [[(0,), (1,), (2,), (3,)]] * EACH + [[(0,), (1, 2), (3,)]] * EACH


async def test_the_end_of_a_stream_does_not_wait():
    all_ = Streams(EACH + 1)
    await all_.push(0)
    await all_.push(1)
    assert all_.got[-1] == [(0,)]
    await all_.push(2, all_.streams[-1:], FinishReason.STOP)
    assert all_.got[-1] == [(0,), (1, 2)]
    for task in all_.tasks[:-1]:
        task.cancel()


async def test_an_error_does_not_wait_and_comes_behind_what_came_before():
    all_ = Streams(EACH + 1)
    await all_.push(0)
    await all_.push(1)
    all_.streams[-1].fail(RuntimeError("gone"))
    await settled()
    assert all_.got[-1] == [(0,), (1,)]
    with pytest.raises(RuntimeError, match="gone"):
        await all_.tasks[-1]
    await all_.end_pause()
    await all_.push(2, all_.streams[:EACH])
    await all_.end_pause()
    assert all_.got[0] == [(0,), (1,), (2,)]  # others go on
    for task in all_.tasks[:-1]:
        task.cancel()


@pytest.mark.parametrize("reason", [FinishReason.FORMAT, FinishReason.FAILED])
async def test_tokens_that_wait_are_sent_before_a_failure(reason):
    """The status of the call tells the failure, and a status has no tokens."""
    all_ = Streams(EACH + 1)
    await all_.push(0)
    await all_.push(1)
    assert all_.got[-1] == [(0,)]
    await all_.push(None, all_.streams[-1:], reason)
    assert all_.got[-1] == [(0,), (1,), ()]
    assert all_.reasons[-1] == [None, None, reason]
    for task in all_.tasks[:-1]:
        task.cancel()


async def test_few_streams_never_wait():
    all_ = Streams(EACH)
    for token in range(5):
        await all_.push(token)
        if all_.paused:
            await all_.end_pause()
    assert all_.got == [[(token,) for token in range(5)]] * EACH
    for task in all_.tasks:
        task.cancel()
