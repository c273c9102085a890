"""Routing policies on a recorded trace, simulated: prefill tokens and time to first token.

`python -m benchmarks.prefix_routing TRACE [--replicas 4] [--busy 0.7] [--frontends 1]`: TRACE is JSONL with
hash_ids. A replica computes one prompt after the other at a fixed rate and keeps the blocks that it computed
by LRU; a request counts as in flight until its answer ends (30 ms a token). The rate is such that replicas
are busy for --busy of the trace where nothing is cached. Half way, one replica gets no requests for 60 s and
comes back empty. The policies are those of the frontend.

With several frontends, requests go to them in turn. "own" counts only a frontend's own requests, "shared"
also those of the others, as each replica reports them once a second. "exact" knows what each replica holds,
as if replicas told all frontends of every block at once.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_frontend.policy.balancing import LeastLoaded, Policy, PrefixAffinity, Question, RandomOfTwo
from moe_frontend.policy.prefixes import PrefixIndex
from moe_frontend.policy.routing import Load
from moe_tools.cache_replay.recording import Request, read

TOKEN_S = 0.03
LOST_S = 60.0
POLL_S = 1.0


@dataclass
class Replica:
    name: str
    holds: int
    rate: float
    free_at: float = 0.0
    in_flight: int = 0
    prefilled: int = 0
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def held(self, blocks: Sequence[int]) -> int:
        """Leading blocks that are cached."""
        return next((index for index, block in enumerate(blocks) if block not in self.cache), len(blocks))

    def compute(self, request: Request, blocks: Sequence[int]) -> int:
        """Tokens of the prompt that are not cached."""
        known = self.held(blocks)
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.holds:
            self.cache.popitem(last=False)
        return request.prompt_tokens * (len(blocks) - known) // max(1, len(blocks))


class ExactIndex(PrefixIndex):
    """Knows what each replica holds."""

    def __init__(self, fleet: list[Replica]) -> None:
        super().__init__()
        self._fleet = fleet

    def held(self, blocks: Sequence[int], now: float) -> dict[str, int]:  # noqa: ARG002
        return {replica.name: replica.held(blocks) for replica in self._fleet}


@dataclass
class Frontend:
    """One frontend: its policy, its requests by replica, and those of others as last reported."""

    policy: Policy
    shared: bool
    own: dict[str, int]
    elsewhere: dict[str, int]
    polled_at: float = -POLL_S
    last_chosen: dict[str, int] = field(default_factory=dict)

    def choose(self, ready: list[Replica], costs: Sequence[float], number: int) -> Replica:
        """The cheapest replica; of several the one that was not chosen for longest."""
        _, _, place = min(
            (cost, self.last_chosen.get(one.name, -1), place)
            for place, (cost, one) in enumerate(zip(costs, ready, strict=True))
        )
        self.last_chosen[ready[place].name] = number
        return ready[place]

    def loads(self, ready: list[Replica], now: float) -> list[Load]:
        if self.shared and now - self.polled_at >= POLL_S:
            self.polled_at = now
            self.elsewhere = {one.name: one.in_flight - self.own[one.name] for one in ready}
        return [
            Load(one.name, self.own[one.name], elsewhere=self.elsewhere.get(one.name, 0)) for one in ready
        ]


@dataclass(frozen=True)
class Result:
    tokens: int
    waits: list[float]
    most: int
    """Requests on one replica at a time."""


def simulate(
    make: Callable[[list[Replica]], Policy],
    requests: list[Request],
    given: argparse.Namespace,
    rate: float,
    *,
    shared: bool,
) -> Result:
    fleet = [Replica(f"replica-{number}", given.holds, rate) for number in range(given.replicas)]
    frontends = [
        Frontend(make(fleet), shared, {one.name: 0 for one in fleet}, {}) for _ in range(given.frontends)
    ]
    ends: list[tuple[float, int, Replica, Frontend]] = []
    waits: list[float] = []
    lost, span = fleet[-1], requests[-1].at_s - requests[0].at_s
    lost_at, most = requests[0].at_s + span / 2, 0
    down = False
    for number, request in enumerate(requests):
        now = request.at_s
        while ends and ends[0][0] <= now:
            _, _, replica, sender = heapq.heappop(ends)
            replica.in_flight -= 1
            sender.own[replica.name] -= 1
        if len(fleet) > 1 and down != (lost_at <= now < lost_at + LOST_S):
            down = not down
            lost.cache.clear()
            for frontend in frontends:
                frontend.policy.keep(frozenset(one.name for one in fleet if not (down and one is lost)))
        ready = [one for one in fleet if not (down and one is lost)]
        frontend = frontends[number % len(frontends)]
        question = Question(tuple(hash(key) for key in request.keys))
        costs = frontend.policy.costs(question, frontend.loads(ready, now), now)
        chosen = frontend.choose(ready, costs, number)
        frontend.policy.sent(question, chosen.name, now)
        tokens = chosen.compute(request, question.blocks)
        chosen.prefilled += tokens
        chosen.free_at = max(chosen.free_at, now) + tokens / rate
        waits.append(chosen.free_at - now)
        chosen.in_flight += 1
        frontend.own[chosen.name] += 1
        most = max(most, chosen.in_flight)
        heapq.heappush(ends, (chosen.free_at + TOKEN_S * request.answer_tokens, number, chosen, frontend))
    return Result(sum(one.prefilled for one in fleet), waits, most)


POLICIES: dict[str, Callable[[list[Replica]], Policy]] = {
    "least-loaded": lambda _: LeastLoaded(),
    "random-of-two": lambda _: RandomOfTwo(random.Random(1)),
    "prefix-affinity": lambda _: PrefixAffinity(PrefixIndex()),
    "prefix-affinity, exact": lambda fleet: PrefixAffinity(ExactIndex(fleet)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--busy", type=float, default=0.7)
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--holds", type=int, default=2000, help="Blocks that one replica's cache holds.")
    given = parser.parse_args()
    requests = sorted(read(given.trace).requests, key=lambda request: request.at_s)
    requests = [
        request if request.prompt_tokens else Request(request.keys, 64 * len(request.keys), 60, request.at_s)
        for request in requests
    ]
    span = requests[-1].at_s - requests[0].at_s
    rate = sum(request.prompt_tokens for request in requests) / span / given.replicas / given.busy
    print(
        f"{given.trace.name}: {len(requests)} requests, {given.frontends} frontends, "
        f"{given.replicas} replicas of {rate:.0f} tokens/s"
    )
    for name, make in POLICIES.items():
        for shared in (False, True)[: min(2, given.frontends)]:
            result = simulate(make, requests, given, rate, shared=shared)
            cuts = statistics.quantiles(result.waits, n=100)
            print(
                f"{name:23} {'shared' if shared else 'own':6} prefill tokens {result.tokens:>11}   "
                f"time to first token p50 {cuts[49]:6.2f} s  p99 {cuts[98]:6.2f} s   "
                f"most in flight {result.most}",
                flush=True,
            )


if __name__ == "__main__":
    main()
