"""Cost of eviction policies: microseconds of a hit, and of a miss with its eviction.

`python -m benchmarks.eviction_cost TRACE CAPACITY...`: TRACE as for `moe replay --cache`. The least of three
rounds of CPU time counts, because other processes can only add to it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.commands import positive, run
from moe_api.caching import POLICIES
from moe_api.caching.policy import kind_of
from moe_tools.cache_replay.recording import Key, KeyTrace, read
from moe_tools.recorded import TraceError

ROUNDS = 3


def accesses(recording: KeyTrace) -> list[tuple[Key, int]]:
    return [
        (key, kind_of(request.answer_tokens, last=recording.blocks and index == len(request.keys) - 1))
        for request in recording.requests
        for index, key in enumerate(request.keys)
    ]


def cost(name: str, trace: list[tuple[Key, int]], capacity: int) -> tuple[float, float]:
    """Microseconds of a hit, and of a miss that evicts."""
    policy = POLICIES[name](capacity)
    resident: set[Key] = set()
    spent, counts, now = [0.0, 0.0], [0, 0], time.thread_time
    for key, kind in trace:
        miss = key not in resident
        if miss and len(resident) < capacity:
            policy.admit(key, kind)
            resident.add(key)
            continue
        began = now()
        if miss:
            victim = policy.evict(key)
            policy.admit(key, kind)
        else:
            policy.hit(key, kind)
        spent[miss] += now() - began
        counts[miss] += 1
        if miss:
            resident.remove(victim)
            resident.add(key)
    hit, miss_cost = (
        1e6 * (total / max(1, count) - _clock_s()) for total, count in zip(spent, counts, strict=True)
    )
    return hit, miss_cost


def _clock_s() -> float:
    """Seconds of one reading of the clock."""
    began = time.thread_time()
    for _ in range(10_000):
        time.thread_time()
    return (time.thread_time() - began) / 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("capacity", type=positive, nargs="+")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="Default: all.")
    given = parser.parse_args()
    trace = accesses(read(given.trace))
    for capacity in given.capacity:
        for name in given.policy or POLICIES:
            rounds = [cost(name, trace, capacity) for _ in range(ROUNDS)]
            hit, miss = (min(column) for column in zip(*rounds, strict=True))
            print(
                f"{given.trace.name} {capacity:>6} {name:7} hit {hit:5.2f} us   miss {miss:5.2f} us",
                flush=True,
            )


if __name__ == "__main__":
    run(main, TraceError)
