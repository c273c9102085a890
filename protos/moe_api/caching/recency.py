"""LRU, and LRU-K with K = 2.

LRU-K: O'Neil, O'Neil, Weikum: The LRU-K Page Replacement Algorithm for Database Disk Buffering, SIGMOD 1993.
"""

import heapq
from collections import OrderedDict
from typing import Final, Generic

from moe_api.caching.policy import K

_NEVER: Final = -1
_STALE_MOST: Final = 4
"""The heap is rebuilt where it holds this many times more entries than keys are resident."""


class LRU(Generic[K]):
    """Evicts the least recently used key."""

    def __init__(self, capacity: int) -> None:  # noqa: ARG002 - the same signature for all policies
        self._keys: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def hit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.hit`."""
        self._keys.move_to_end(key)

    def evict(self, incoming: K) -> K:  # noqa: ARG002
        """As `Policy.evict`."""
        return self._keys.popitem(last=False)[0]

    def admit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.admit`."""
        self._keys[key] = None

    def remove(self, key: K) -> None:
        """As `Policy.remove`."""
        del self._keys[key]


class LRU2(Generic[K]):
    """Evicts the key whose last but one use is longest ago; keys used once go first, the oldest first.

    The history of an evicted key is retained until `capacity` more keys were evicted. The correlated
    reference period is 0. Calls take O(log n).
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._uses: dict[K, tuple[int, int]] = {}
        """Resident keys: times of the last but one use and of the last one."""
        self._history: OrderedDict[K, int] = OrderedDict()
        """Evicted keys: time of their last use."""
        self._heap: list[tuple[int, int, K]] = []
        self._now = 0

    def __len__(self) -> int:
        return len(self._uses)

    def hit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.hit`."""
        self._use(key, self._uses[key][1])

    def evict(self, incoming: K) -> K:  # noqa: ARG002
        """As `Policy.evict`."""
        if not self._uses:
            raise KeyError("no key is resident")
        while True:
            earlier, last, key = heapq.heappop(self._heap)
            if self._uses.get(key) == (earlier, last):
                break
        del self._uses[key]
        self._history[key] = last
        if len(self._history) > self._capacity:
            self._history.popitem(last=False)
        return key

    def admit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.admit`."""
        self._use(key, self._history.pop(key, _NEVER))

    def remove(self, key: K) -> None:
        """As `Policy.remove`."""
        del self._uses[key]

    def _use(self, key: K, earlier: int) -> None:
        self._now += 1
        self._uses[key] = earlier, self._now
        heapq.heappush(self._heap, (earlier, self._now, key))
        if len(self._heap) > _STALE_MOST * len(self._uses) + _STALE_MOST:
            self._heap = [(*times, resident) for resident, times in self._uses.items()]
            heapq.heapify(self._heap)
