"""S3-FIFO and SIEVE: first-in-first-out queues whose entries get another chance.

S3-FIFO: Yang, Zhang, Qiu, Yue, Vinayak: FIFO Queues are All You Need for Cache Eviction, SOSP 2023.
SIEVE: Zhang, Yang, Yue, Vigfusson, Rashmi: SIEVE is Simpler than LRU, NSDI 2024.
"""

from collections import OrderedDict
from typing import Final, Generic

from moe_api.caching.policy import K

_MOST_USES: Final = 3
_SMALL_SHARE: Final = 10
"""The small queue takes a tenth of the cache."""


class S3FIFO(Generic[K]):
    """A small queue for new keys, a main queue for those used again, and names of keys evicted from small."""

    def __init__(self, capacity: int) -> None:
        self._small_most = max(1, capacity // _SMALL_SHARE)
        self._ghosts_most = max(1, capacity - self._small_most)
        self._small: OrderedDict[K, int] = OrderedDict()
        self._main: OrderedDict[K, int] = OrderedDict()
        self._ghosts: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def hit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.hit`."""
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, _MOST_USES)

    def evict(self, incoming: K) -> K:  # noqa: ARG002
        """As `Policy.evict`."""
        while self._small and (len(self._small) >= self._small_most or not self._main):
            key, uses = self._small.popitem(last=False)
            if uses <= 1:
                self._remember(key)
                return key
            self._main[key] = 0
        while True:
            key, uses = self._main.popitem(last=False)
            if not uses:
                return key
            self._main[key] = uses - 1

    def admit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.admit`."""
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def remove(self, key: K) -> None:
        """As `Policy.remove`."""
        if key in self._small:
            del self._small[key]
        else:
            del self._main[key]

    def _remember(self, key: K) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > self._ghosts_most:
            self._ghosts.popitem(last=False)


class _Entry(Generic[K]):
    """A key in SIEVE's queue; `newer` and `older` are its neighbours."""

    __slots__ = ("key", "newer", "older", "visited")

    def __init__(self, key: K, older: "_Entry[K] | None") -> None:
        self.key = key
        self.older = older
        self.newer: _Entry[K] | None = None
        self.visited = False


class Sieve(Generic[K]):
    """A queue, and a hand that moves from the oldest key to the newest; it evicts the first not visited."""

    def __init__(self, capacity: int) -> None:  # noqa: ARG002
        self._entries: dict[K, _Entry[K]] = {}
        self._newest: _Entry[K] | None = None
        self._oldest: _Entry[K] | None = None
        self._hand: _Entry[K] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def hit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.hit`."""
        self._entries[key].visited = True

    def evict(self, incoming: K) -> K:  # noqa: ARG002
        """As `Policy.evict`."""
        entry = self._hand or self._oldest
        while entry is not None and entry.visited:
            entry.visited = False
            entry = entry.newer or self._oldest
        if entry is None:
            raise KeyError("no key is resident")
        self._hand = entry
        self.remove(entry.key)
        return entry.key

    def admit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.admit`."""
        entry = self._entries[key] = _Entry(key, self._newest)
        if self._newest is None:
            self._oldest = entry
        else:
            self._newest.newer = entry
        self._newest = entry

    def remove(self, key: K) -> None:
        """As `Policy.remove`."""
        entry = self._entries.pop(key)
        if self._hand is entry:
            self._hand = entry.newer
        if entry.older is None:
            self._oldest = entry.newer
        else:
            entry.older.newer = entry.newer
        if entry.newer is None:
            self._newest = entry.older
        else:
            entry.newer.older = entry.older
