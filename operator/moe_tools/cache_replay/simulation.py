"""Runs a recorded trace through a cache of a fixed number of keys, once for each eviction policy.

Keys are looked up one by one, in order. A block counts as a hit where it is resident, as in published
figures of block hits; an engine can use it only where all blocks before it are resident as well, so
`recomputed` counts tokens behind the first block that is missing.

A policy may use the length of the answer to a block's last request. An engine knows it before the first
moment at which it could evict the block: blocks in use are never evicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from moe_api.caching import POLICIES
from moe_api.caching.belady import Belady
from moe_api.caching.policy import Policy, kind_of
from moe_tools.cache_replay.recording import Key, KeyTrace, Request

BELADY: Final = "belady"
NAMES: Final = (*POLICIES, BELADY)
_TELL_EVERY: Final = 256


@dataclass(frozen=True)
class CacheOutcome:
    """The result of one policy.

    lookups, hits, evictions: keys.
    recomputed: prompt tokens after the first missing block; misses, if keys are objects.
    positions: sum of the positions of these tokens: the cost of attention in prefill grows with the position.
    by_request: `recomputed` of each request, in the order of the trace.
    """

    lookups: int = 0
    hits: int = 0
    evictions: int = 0
    recomputed: int = 0
    positions: int = 0
    by_request: tuple[int, ...] = ()

    @property
    def hit_share(self) -> float:
        """Hits per lookup; 0 without lookups."""
        return self.hits / self.lookups if self.lookups else 0.0


def run(
    name: str, recording: KeyTrace, capacity: int, advance: Callable[[int], None] = lambda _: None
) -> CacheOutcome:
    """Runs the whole trace.

    Args:
        name: of `NAMES`.
        recording: the trace.
        capacity: of the cache in keys, at least 1.
        advance: called with the number of finished requests.
    """
    if name == BELADY:
        policy: Policy[Any] = Belady([key for request in recording.requests for key in request.keys])
    else:
        policy = POLICIES[name](capacity)
    cache = _Cache(policy, capacity)
    for done, request in enumerate(recording.requests, start=1):
        cache.ask(request, blocks=recording.blocks)
        if not done % _TELL_EVERY:
            advance(done)
    advance(len(recording.requests))
    return CacheOutcome(
        cache.lookups,
        cache.hits,
        cache.evictions,
        sum(cache.recomputed),
        cache.positions,
        tuple(cache.recomputed),
    )


def ceiling(recording: KeyTrace) -> CacheOutcome:
    """A cache without a limit: every key is missed once."""
    unique = len({key for request in recording.requests for key in request.keys})
    return run("lru", recording, max(1, unique))


class _Cache:
    def __init__(self, policy: Policy[Key], capacity: int) -> None:
        self._policy = policy
        self._capacity = capacity
        self._uses: dict[Key, int] = {}
        """Resident keys: uses since they became resident."""
        self.lookups = self.hits = self.evictions = self.positions = 0
        self.recomputed: list[int] = []

    def ask(self, request: Request, *, blocks: bool) -> None:
        """Looks up all keys of a request; missing ones become resident."""
        origin, known, end = 0, 0, len(request.keys) - 1
        for index, key in enumerate(request.keys):
            last = blocks and index == end
            if key in self._uses:
                known += known == index
                origin = self._uses[key] = self._uses[key] + 1
                self._policy.hit(key, kind_of(request.answer_tokens, origin, last=last))
                self.hits += 1
            else:
                self._admit(key, kind_of(request.answer_tokens, origin, last=last))
        self.lookups += len(request.keys)
        self._count_recomputed(request, known)

    def _admit(self, key: Key, kind: int) -> None:
        while len(self._uses) >= self._capacity:
            del self._uses[self._policy.evict(key)]
            self.evictions += 1
        self._policy.admit(key, kind)
        self._uses[key] = 1

    def _count_recomputed(self, request: Request, known: int) -> None:
        """known: consecutive resident blocks at the start of the prompt."""
        blocks = len(request.keys)
        tokens = request.prompt_tokens or blocks
        first = tokens * known // blocks if blocks else tokens
        self.recomputed.append(tokens - first)
        self.positions += (tokens * (tokens - 1) - first * (first - 1)) // 2
