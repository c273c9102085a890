"""Hits of the worker's prefix tree on recorded traces, compared with plain LRU of the same blocks.

`python -m benchmarks.prefix_tree TRACE CAPACITY...`: TRACE is JSONL with hash_ids; a hit is a block that can
be used, since all blocks before it are in the tree. One request after the other, so nothing stays pinned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands import positive, run
from moe_tools.cache_replay import simulation
from moe_tools.cache_replay.recording import KeyTrace, read
from moe_tools.recorded import TraceError
from moe_worker.kvcache.pages import PagePool
from moe_worker.kvcache.prefix import PrefixTree


def hits(recording: KeyTrace, capacity: int) -> int:
    pool = PagePool(capacity)
    tree, found = PrefixTree(pool, 1), 0
    numbers: dict[int | str, int] = {}
    for request in recording.requests:
        tokens = [numbers.setdefault(key, len(numbers)) for key in request.keys[:capacity]]
        node, pages = tree.match(tokens)
        found += len(pages)
        fresh = len(tokens) - len(pages)
        tree.evict(fresh - pool.free)
        node, _ = tree.insert(node, tokens[len(pages) :], pool.take(fresh))
        tree.release(node)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("capacity", type=positive, nargs="+")
    given = parser.parse_args()
    recording = read(given.trace)
    for capacity in given.capacity:
        lru = simulation.run("lru", recording, capacity)
        share = hits(recording, capacity) / lru.lookups
        print(f"{given.trace.name} {capacity:>6} blocks: LRU {lru.hit_share:.2%}, prefix tree {share:.2%}")


if __name__ == "__main__":
    run(main, TraceError)
