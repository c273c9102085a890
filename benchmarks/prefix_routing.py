"""Routing policies on a recorded trace, simulated: prefill tokens and time to first token.

`python -m benchmarks.prefix_routing TRACE [--replicas 4] [--busy 0.7]`: TRACE is JSONL with hash_ids. A
replica computes one prompt after the other at a fixed rate and keeps the blocks that it computed by LRU; a
request counts as in flight until its answer ends (30 ms a token). The rate is such that replicas are busy for
--busy of the trace where nothing is cached. Half way, one replica gets no requests for 60 s and comes back
empty. The policies are those of the frontend.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from moe_frontend.policy.balancing import LeastLoaded, Policy, PrefixAffinity, Question, RandomOfTwo
from moe_frontend.policy.prefixes import PrefixIndex
from moe_frontend.policy.routing import Load
from moe_tools.cache_replay.recording import Key, Request, read

TOKEN_S = 0.03
LOST_S = 60.0


@dataclass
class Replica:
    name: str
    holds: int
    rate: float
    free_at: float = 0.0
    in_flight: int = 0
    prefilled: int = 0
    cache: OrderedDict[Key, None] = field(default_factory=OrderedDict)

    def compute(self, request: Request) -> int:
        """Tokens of the prompt that are not cached."""
        known = 0
        for key in request.keys:
            if key not in self.cache:
                break
            known += 1
        for key in reversed(request.keys):
            self.cache[key] = None
            self.cache.move_to_end(key)
        while len(self.cache) > self.holds:
            self.cache.popitem(last=False)
        return request.prompt_tokens * (len(request.keys) - known) // max(1, len(request.keys))


def simulate(
    policy: Policy, requests: list[Request], replicas: int, holds: int, rate: float
) -> tuple[int, list[float], int]:
    """Prefill tokens, times to first token, and the most requests on one replica at a time."""
    fleet = [Replica(f"replica-{number}", holds, rate) for number in range(replicas)]
    ends: list[tuple[float, int, int]] = []
    waits: list[float] = []
    lost, span = fleet[-1], requests[-1].at_s - requests[0].at_s
    lost_at, most = requests[0].at_s + span / 2, 0
    back_at, down = lost_at + LOST_S, False
    for number, request in enumerate(requests):
        now = request.at_s
        while ends and ends[0][0] <= now:
            fleet[heapq.heappop(ends)[2]].in_flight -= 1
        if replicas > 1 and down != (lost_at <= now < back_at):
            down = not down
            lost.cache.clear()
            policy.keep(frozenset(one.name for one in fleet if not (down and one is lost)))
        ready = [one for one in fleet if not (down and one is lost)]
        loads = [Load(one.name, one.in_flight) for one in ready]
        question = Question(tuple(hash(key) for key in request.keys))
        costs = policy.costs(question, loads, now)
        index = min(range(len(ready)), key=lambda place: (costs[place], ready[place].free_at))
        chosen = ready[index]
        policy.sent(question, chosen.name, now)
        tokens = chosen.compute(request)
        chosen.prefilled += tokens
        chosen.free_at = max(chosen.free_at, now) + tokens / rate
        waits.append(chosen.free_at - now)
        chosen.in_flight += 1
        most = max(most, chosen.in_flight)
        heapq.heappush(ends, (chosen.free_at + TOKEN_S * request.answer_tokens, number, fleet.index(chosen)))
    return sum(one.prefilled for one in fleet), waits, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--busy", type=float, default=0.7)
    parser.add_argument("--holds", type=int, default=2000, help="Blocks that one replica's cache holds.")
    given = parser.parse_args()
    requests = sorted(read(given.trace).requests, key=lambda request: request.at_s)
    requests = [
        request if request.prompt_tokens else Request(request.keys, 64 * len(request.keys), 60, request.at_s)
        for request in requests
    ]
    span = requests[-1].at_s - requests[0].at_s
    rate = sum(request.prompt_tokens for request in requests) / span / given.replicas / given.busy
    policies: dict[str, Policy] = {
        "least-loaded": LeastLoaded(),
        "random-of-two": RandomOfTwo(random.Random(1)),
        "prefix-affinity": PrefixAffinity(PrefixIndex()),
    }
    print(f"{given.trace.name}: {len(requests)} requests, {given.replicas} replicas of {rate:.0f} tokens/s")
    for name, policy in policies.items():
        tokens, waits, most = simulate(policy, requests, given.replicas, given.holds, rate)
        cuts = statistics.quantiles(waits, n=100)
        print(
            f"{name:16} prefill tokens {tokens:>11}   time to first token p50 {cuts[49]:6.2f} s  "
            f"p99 {cuts[98]:6.2f} s   most in flight {most}"
        )


if __name__ == "__main__":
    main()
