"""Which blocks of prompts the engine's cache holds, for any number of receivers. Belongs to one event loop.

A receiver gets a snapshot first, then changes. Changes that it has not taken yet are merged; if there are too
many, it gets another snapshot instead.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

from moe_api.prefixes import CHANGE_MOST
from moe_worker.errors import QueueFullError

RECEIVERS_MOST = 256
"""There are at most 100 frontends; some may be connected twice for a while."""
MERGED_MOST = 16_384
FLUSH_S = 0.05
"""Between two messages, in seconds."""


@dataclass(frozen=True)
class Change:
    """Blocks that came and went; reset: the first message of a snapshot."""

    reset: bool
    stored: tuple[int, ...]
    evicted: tuple[int, ...] = ()


class Receiver:
    """One receiver's view: what it has not taken yet."""

    def __init__(self, feed: "CacheFeed") -> None:
        self._feed = feed
        self._changes: dict[int, bool] | None = None  # None: a snapshot is due
        self.news = asyncio.Event()
        self.news.set()

    def note(self, names: Iterable[int], *, stored: bool) -> None:
        """Adds changes."""
        if self._changes is not None:
            self._changes.update(dict.fromkeys(names, stored))
            if len(self._changes) > MERGED_MOST:
                self._changes = None
        self.news.set()

    async def changes(self) -> AsyncIterator[Change]:
        """What to send, in order, until the engine ends."""
        while True:
            await self.news.wait()
            self.news.clear()
            if self._feed.closed:
                return
            for change in self._take():
                yield change
                await asyncio.sleep(FLUSH_S if not change.reset else 0)

    def _take(self) -> list[Change]:
        if self._changes is None:
            self._changes = {}
            parts = _parts(self._feed.names) or [()]
            return [Change(not number, part) for number, part in enumerate(parts)]
        changes, self._changes = self._changes, {}
        stored = _parts(name for name, came in changes.items() if came)
        evicted = _parts(name for name, came in changes.items() if not came)
        return [Change(False, (), part) for part in evicted] + [Change(False, part) for part in stored]


class CacheFeed:
    """Knows what the engine's cache holds, once anybody wants to know.

    Attributes:
        names: of the blocks, in no order.
        wanted: whether there ever was a receiver. Naming blocks takes time, so it begins then.
        closed: whether the engine has ended.
    """

    def __init__(self) -> None:
        self.names: dict[int, None] = {}
        self.wanted = False
        self.closed = False
        self._receivers: set[Receiver] = set()

    def change(self, stored: Iterable[int], evicted: Iterable[int]) -> None:
        """Applies a report of the engine."""
        for name in evicted:
            self.names.pop(name, None)
        self.names.update(dict.fromkeys(stored))
        for receiver in self._receivers:
            receiver.note(evicted, stored=False)
            receiver.note(stored, stored=True)

    @contextlib.contextmanager
    def receiver(self) -> Iterator[Receiver]:
        """A receiver for the time of the block. Raises QueueFullError."""
        if len(self._receivers) >= RECEIVERS_MOST:
            raise QueueFullError(
                f"the cache is watched by {RECEIVERS_MOST} receivers already; end one of them", 10.0
            )
        self.wanted = True
        receiver = Receiver(self)
        self._receivers.add(receiver)
        try:
            yield receiver
        finally:
            self._receivers.discard(receiver)

    def close(self) -> None:
        """The engine has ended: so do all receivers."""
        self.closed = True
        for receiver in self._receivers:
            receiver.news.set()


def _parts(names: Iterable[int]) -> list[tuple[int, ...]]:
    """Names in messages of bounded size."""
    given = tuple(names)
    return [given[start : start + CHANGE_MOST] for start in range(0, len(given), CHANGE_MOST)]
