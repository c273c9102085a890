"""Receivers of what the cache holds: each knows the same in the end, however it reads."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.worker.v1 import worker_pb2
from moe_frontend.policy.watched import Held
from moe_worker.errors import QueueFullError
from moe_worker.service import cache_feed
from moe_worker.service.cache_feed import CacheFeed

NAMES = st.lists(st.integers(0, 12), max_size=6)


class Reader:
    """A frontend: reads some messages at a time."""

    def __init__(self, receiver):
        self.held = Held()
        self._changes = receiver.changes()

    async def read(self, count):
        for number in range(count):
            change = await asyncio.wait_for(anext(self._changes), 60)
            message = worker_pb2.CacheChange(
                sequence=self.held.sequence + 1,
                reset=change.reset,
                stored=change.stored,
                evicted=change.evicted,
            )
            assert len(message.stored) + len(message.evicted) <= cache_feed.CHANGE_MOST
            assert message.reset == (number == 0) or self.held.sequence > 0
            self.held.apply(message, 1000)

    async def until(self, names):
        async with asyncio.timeout(60):
            while self.held.blocks != set(names):
                await self.read(1)


@given(
    st.lists(st.tuples(NAMES, NAMES, st.booleans()), max_size=12),
    st.integers(1, 4),
    st.sampled_from([2, 1000]),
)
def test_every_receiver_knows_what_the_cache_holds(reports, part, merged):
    async def play():
        feed, readers = CacheFeed(), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_feed, "CHANGE_MOST", part)
            patch.setattr(cache_feed, "MERGED_MOST", merged)
            patch.setattr(cache_feed, "FLUSH_S", 0)
            with feed.receiver() as first, feed.receiver() as last:
                readers = [Reader(first), Reader(last)]
                await readers[0].read(1)
                for stored, evicted, reads in reports:
                    feed.change(set(stored) - set(evicted), evicted)
                    if reads:
                        await readers[0].until(feed.names)
                for reader in readers:
                    await reader.until(feed.names)

    asyncio.run(play())


async def test_a_receiver_ends_with_the_engine():
    feed = CacheFeed()
    with feed.receiver() as receiver:
        changes = receiver.changes()
        assert (await anext(changes)).reset
        feed.close()
        with pytest.raises(StopAsyncIteration):
            await anext(changes)


def test_receivers_are_few(monkeypatch):
    monkeypatch.setattr(cache_feed, "RECEIVERS_MOST", 1)
    feed = CacheFeed()
    assert not feed.wanted
    with feed.receiver(), pytest.raises(QueueFullError), feed.receiver():
        pass
    with feed.receiver():
        assert feed.wanted
