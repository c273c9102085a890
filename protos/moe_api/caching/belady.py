"""The optimum, which knows the future.

Belady: A Study of Replacement Algorithms for a Virtual-Storage Computer, IBM Systems Journal 1966.
"""

import heapq
from collections.abc import Hashable, Sequence
from typing import Generic

from moe_api.caching.policy import K


def next_uses(keys: Sequence[Hashable]) -> list[int]:
    """For each place of the trace the place of the key's next use; len(keys) or more where there is none."""
    following: dict[Hashable, int] = {}
    places = [0] * len(keys)
    for place in range(len(keys) - 1, -1, -1):
        key = keys[place]
        places[place] = following.get(key, len(keys) + place)
        following[key] = place
    return places


class Belady(Generic[K]):
    """Evicts the key whose next use is furthest away. `hit` and `admit` follow `trace` key by key."""

    def __init__(self, trace: Sequence[K]) -> None:
        self._next = next_uses(trace)
        self._place = 0
        self._resident: dict[K, int] = {}
        self._heap: list[tuple[int, K]] = []

    def __len__(self) -> int:
        return len(self._resident)

    def hit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.hit`."""
        self._use(key)

    def evict(self, incoming: K) -> K:  # noqa: ARG002
        """As `Policy.evict`."""
        if not self._resident:
            raise KeyError("no key is resident")
        while True:
            place, key = heapq.heappop(self._heap)
            if self._resident.get(key) == -place:
                del self._resident[key]
                return key

    def admit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.admit`."""
        self._use(key)

    def remove(self, key: K) -> None:
        """As `Policy.remove`."""
        del self._resident[key]

    def _use(self, key: K) -> None:
        following = self._next[self._place]
        self._place += 1
        self._resident[key] = following
        heapq.heappush(self._heap, (-following, key))
