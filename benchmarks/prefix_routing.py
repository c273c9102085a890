"""Routing policies on a recorded trace, simulated: prefill tokens and time to first token.

`python -m benchmarks.prefix_routing TRACE [--replicas 4] [--busy 0.7] [--frontends 1]`: TRACE is JSONL with
hash_ids. A replica computes one prompt after the other at a fixed rate and keeps the blocks that it computed
by LRU; a request counts as in flight until its answer ends (30 ms a token). The rate is such that replicas
are busy for --busy of the trace where nothing is cached. Half way, one replica gets no requests for 60 s and
comes back empty. The policies are those of the frontend.

With several frontends, requests go to them in turn. "own" counts only a frontend's own requests, "shared"
also those of the others, as each replica reports them once a second. With prefix-affinity-exact, every
frontend hears 0.1 s later of each block that a replica is to compute or evicts, as by WatchCache.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.commands import above_zero, positive, run
from moe_api.prefixes import CHANGE_MOST
from moe_api.worker.v1 import worker_pb2
from moe_frontend.policy.balancing import (
    ExactPrefixAffinity,
    LeastLoaded,
    Policy,
    PrefixAffinity,
    Question,
    RandomOfTwo,
)
from moe_frontend.policy.routing import Load
from moe_frontend.policy.watched import Held
from moe_tools.cache_replay.recording import Request, read
from moe_tools.recorded import TraceError

TOKEN_S = 0.03
LOST_S = 60.0
POLL_S = 1.0
HEARD_S = 0.1
MASK = 2**64 - 1
Event = tuple[float, int, Callable[[], None]]
"""When it happens, its place among those of the same time, and what happens."""


@dataclass
class Replica:
    name: str
    holds: int
    rate: float
    free_at: float = 0.0
    in_flight: int = 0
    prefilled: int = 0
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    changes: list[tuple[float, int, bool]] = field(default_factory=list)
    """When frontends hear that a block is stored (True) or evicted."""

    def held(self, blocks: Sequence[int]) -> int:
        """Leading blocks that are cached."""
        return next((index for index, block in enumerate(blocks) if block not in self.cache), len(blocks))

    def compute(self, request: Request, blocks: Sequence[int], now: float) -> int:
        """Tokens of the prompt that are not cached."""
        known = self.held(blocks)
        for block in reversed(blocks):
            if block not in self.cache:
                self.changes.append((now + HEARD_S, block, True))
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.holds:
            self.changes.append((now + HEARD_S, self.cache.popitem(last=False)[0], False))
        return request.prompt_tokens * (len(blocks) - known) // max(1, len(blocks))


@dataclass
class Watch:
    """A frontend's watch of a replica; `heard`: how many of its changes."""

    held: Held = field(default_factory=Held)
    heard: int = 0

    def messages(self, replica: Replica, now: float) -> list[worker_pb2.CacheChange]:
        """What is due, as a worker sends it."""
        due: dict[int, bool] = {}
        while self.heard < len(replica.changes) and replica.changes[self.heard][0] <= now:
            _, block, stored = replica.changes[self.heard]
            due[block] = stored
            self.heard += 1
        names = sorted(due, key=due.__getitem__)  # evicted ones first
        parts = [names[start : start + CHANGE_MOST] for start in range(0, len(names), CHANGE_MOST)]
        first = self.held.sequence == 0
        return [
            worker_pb2.CacheChange(
                sequence=self.held.sequence + number,
                reset=first and number == 1,
                stored=[name for name in part if due[name]],
                evicted=[name for name in part if not due[name]],
            )
            for number, part in enumerate(parts or [[]] * first, 1)
        ]


@dataclass
class Frontend:
    """One frontend: its policy, its requests by replica, those of others as last reported, and the work of
    its prompts that are not computed.
    """

    policy: Policy
    shared: bool
    own: dict[str, int]
    elsewhere: dict[str, int]
    work: dict[str, float]
    polled_at: float = -POLL_S
    last_chosen: dict[str, int] = field(default_factory=dict)
    watches: dict[str, Watch] = field(default_factory=dict)

    def hear(self, ready: list[Replica], now: float) -> None:
        """Takes what replicas told of their caches, where the policy uses that."""
        if not isinstance(self.policy, ExactPrefixAffinity):
            return
        self.watches = {one.name: self.watches.get(one.name) or Watch() for one in ready}
        for one in ready:
            watch = self.watches[one.name]
            for message in watch.messages(one, now):
                self.policy.index.apply(one.name, watch.held, message)

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
            Load(
                one.name,
                self.own[one.name],
                elsewhere=self.elsewhere.get(one.name, 0),
                work=self.work[one.name],
            )
            for one in ready
        ]

    def answered(self, replica: Replica, work: float) -> None:
        """The first token of a request has come."""
        self.work[replica.name] -= work

    def ended(self, replica: Replica) -> None:
        self.own[replica.name] -= 1
        replica.in_flight -= 1


@dataclass(frozen=True)
class Result:
    tokens: int
    waits: list[float]
    most: int
    """Requests on one replica at a time."""


def simulate(
    make: Callable[[], Policy],
    requests: list[Request],
    given: argparse.Namespace,
    rate: float,
    *,
    shared: bool,
) -> Result:
    fleet = [Replica(f"replica-{number}", given.holds, rate) for number in range(given.replicas)]
    nothing = {one.name: 0 for one in fleet}
    frontends = [Frontend(make(), shared, dict(nothing), {}, dict(nothing)) for _ in range(given.frontends)]
    events: list[Event] = []
    waits: list[float] = []
    lost, span = fleet[-1], requests[-1].at_s - requests[0].at_s
    lost_at, most = requests[0].at_s + span / 2, 0
    down = False
    for number, request in enumerate(requests):
        now = request.at_s
        while events and events[0][0] <= now:
            heapq.heappop(events)[2]()
        if len(fleet) > 1 and down != (lost_at <= now < lost_at + LOST_S):
            down = not down
            lost.cache.clear()
            lost.changes.clear()
            for frontend in frontends:
                frontend.policy.keep(frozenset(one.name for one in fleet if not (down and one is lost)))
        ready = [one for one in fleet if not (down and one is lost)]
        frontend = frontends[number % len(frontends)]
        frontend.hear(ready, now)
        question = Question(tuple(hash(key) & MASK for key in request.keys))
        costs = frontend.policy.costs(question, frontend.loads(ready, now), now)
        chosen = frontend.choose(ready, costs, number)
        work = frontend.policy.sent(question, chosen.name, now)
        tokens = chosen.compute(request, question.blocks, now)
        chosen.prefilled += tokens
        chosen.free_at = max(chosen.free_at, now) + tokens / rate
        waits.append(chosen.free_at - now)
        chosen.in_flight += 1
        frontend.own[chosen.name] += 1
        frontend.work[chosen.name] += work
        most = max(most, chosen.in_flight)
        end = chosen.free_at + TOKEN_S * request.answer_tokens
        due: list[Event] = [
            (chosen.free_at, 2 * number, functools.partial(frontend.answered, chosen, work)),
            (end, 2 * number + 1, functools.partial(frontend.ended, chosen)),
        ]
        for event in due:
            heapq.heappush(events, event)
    return Result(sum(one.prefilled for one in fleet), waits, most)


POLICIES: dict[str, Callable[[], Policy]] = {
    "least-loaded": LeastLoaded,
    "random-of-two": lambda: RandomOfTwo(random.Random(1)),
    "prefix-affinity": PrefixAffinity,
    "prefix-affinity-exact": ExactPrefixAffinity,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--replicas", type=positive, default=4)
    parser.add_argument("--busy", type=above_zero, default=0.7)
    parser.add_argument("--frontends", type=positive, default=1)
    parser.add_argument("--holds", type=positive, default=2000, help="Blocks that one replica's cache holds.")
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
    run(main, TraceError)
