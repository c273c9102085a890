"""A heap with lazy deletion: stale entries are dropped at the top, or when there are too many."""

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K", float, tuple[float, int])
T = TypeVar("T")

# With fewer entries than this, compaction is not worth its cost.
SMALL = 64


class LazyHeap(Generic[K, T]):
    """A min-heap of items by key, first in, first out among equal keys. All calls are O(log n) amortized.

    `valid(key, item)` says whether an entry is current; an item that becomes current again is pushed again.
    """

    def __init__(self, valid: Callable[[K, T], bool]) -> None:
        self._valid: Callable[[K, T], bool] = valid
        self._entries: list[tuple[K, int, T]] = []
        self._pushed = 0
        self._most = SMALL

    def __len__(self) -> int:
        """Entries, stale ones included."""
        return len(self._entries)

    def push(self, key: K, item: T) -> None:
        """Adds an item."""
        self._pushed += 1
        heapq.heappush(self._entries, (key, self._pushed, item))
        if len(self._entries) > self._most:
            self._compact()

    def peek(self) -> tuple[K, T] | None:
        """The least valid entry, as (key, item); None where there is none."""
        entries = self._entries
        while entries:
            key, _, item = entries[0]
            if self._valid(key, item):
                return key, item
            heapq.heappop(entries)
        return None

    def pop(self) -> T | None:
        """Takes the least valid item out; None where there is none."""
        least = self.peek()
        if least is None:
            return None
        heapq.heappop(self._entries)
        return least[1]

    def _compact(self) -> None:
        """Drops stale entries. The next compaction runs when the heap has doubled, so pushes stay cheap."""
        self._entries = [entry for entry in self._entries if self._valid(entry[0], entry[2])]
        heapq.heapify(self._entries)
        self._most = max(SMALL, 2 * len(self._entries))
