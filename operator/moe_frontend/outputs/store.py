"""Stores answers of the served revisions, bounded in bytes and time. Belongs to one event loop."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from moe_api.caching.policy import Policy
from moe_api.caching.recency import LRU
from moe_frontend.outputs.answer import Answer


@dataclass(frozen=True)
class _Entry:
    answer: Answer
    revision: str
    stored_at: float
    tenant: str


class Store:
    """Answers by key; the least recently used are evicted first.

    LRU keeps no history of evicted keys, so that memory is bounded by `memory` alone.

    Args:
        memory: bytes of all answers together.
        ttl_s: how long an answer is valid, in seconds.
        clock: seconds, monotonic.

    Attributes:
        bytes: of all answers.
        sizes: bytes of the answers, by class of tenants.
        evictions: by class and reason: capacity, expired, revision.
    """

    def __init__(self, memory: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: dict[bytes, _Entry] = {}
        self._policy: Policy[bytes] = LRU(0)
        self._served: frozenset[str] = frozenset()
        self.bytes = 0
        self.sizes: Counter[str] = Counter()
        self.evictions: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Answer | None:
        """The answer, if it is stored and valid."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() - entry.stored_at >= self._ttl_s:
            self._policy.remove(key)
            self._drop(key, "expired")
            return None
        self._policy.hit(key)
        return entry.answer

    def put(self, key: bytes, answer: Answer, revision: str, tenant: str = "") -> None:
        """Stores an answer, unless its revision is not served or it is larger than the memory.

        tenant: class of its tenant, for metrics.
        """
        if revision not in self._served or answer.size > self._memory or key in self._entries:
            return
        while self.bytes + answer.size > self._memory:
            self._drop(self._policy.evict(key), "capacity")
        self._policy.admit(key)
        self._entries[key] = _Entry(answer, revision, self._clock(), tenant)
        self.bytes += answer.size
        self.sizes[tenant] += answer.size

    def serve(self, revisions: frozenset[str]) -> None:
        """Sets the served revisions; drops answers of others."""
        if revisions == self._served:
            return
        self._served = revisions
        for key in [key for key, entry in self._entries.items() if entry.revision not in revisions]:
            self._policy.remove(key)
            self._drop(key, "revision")

    def _drop(self, key: bytes, reason: str) -> None:
        entry = self._entries.pop(key)
        self.bytes -= entry.answer.size
        self.sizes[entry.tenant] -= entry.answer.size
        self.evictions[entry.tenant, reason] += 1
