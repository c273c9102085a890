"""Bound of eviction by what is known of an access: hits if the rates of use of similar accesses were known.

`python -m benchmarks.eviction_bound TRACE CAPACITY...`: TRACE as for `moe replay --cache`.

Keys that a request uses in the same way (number of uses, place in the prompt) are one access. A network
learns its rate of use by age from all that is known at that time (`_prompts`, `_objects`). It is fitted to
the whole trace except for one fifth of the conversations (or objects), whose rates it then gives, five times.
The replay evicts a key of the access with the lowest index: the highest expected uses per lookup up to any
moment (Gittins). So it knows how accesses of a kind go on, later ones too, and compares all that is resident.
A policy that learns online knows less. It is no strict bound: another model may know more.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.commands import positive, run
from moe_tools.cache_replay import simulation
from moe_tools.cache_replay.recording import Key, KeyTrace, Request, read
from moe_tools.recorded import TraceError

AGES = 36
"""Half octaves of lookups."""
EDGES = 2.0 ** (np.arange(AGES + 1) / 2) - 1
FOLDS = 5
NETWORKS = 2
STEPS = 250
BATCH = 4096
WIDTH = 32
COMPARE_EVERY = 16
"""Lookups between two comparisons of all that is resident."""
SHARED = 100
"""A block with more uses tells no conversation from another."""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Accesses:
    """of: access of each lookup. facts [accesses, F]. owner: conversation or object. at: first lookup."""

    of: list[int] = field(default_factory=list)
    facts: list[list[float]] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)

    def add(self, facts: list[float], owner: int, at: int) -> int:
        self.facts.append(facts)
        self.owner.append(owner)
        self.at.append(at)
        return len(self.at) - 1


def _log(value: float) -> float:
    return math.log2(1 + max(0.0, value))


def _level(uses: int) -> int:
    return min(uses, 4) + (uses > 7) + (uses > 15)


@dataclass
class _Turn:
    """A request: when it came, and what it continues."""

    request: Request
    at: int
    before: _Turn | None
    number: int = 0
    owner: int = 0
    gap: int = 0

    def facts(self, known: int, origin: int, second: int) -> list[float]:
        """known: leading blocks seen before. origin: most uses of one. second: uses of the second block."""
        request, before = self.request, self.before
        blocks = len(request.keys)
        earlier = before.request if before else Request(())
        return [
            _log(blocks), _log(request.answer_tokens), min(self.number, 6), _log(self.gap), before is None,
            _log(blocks - len(earlier.keys)) if before else 0, blocks < len(earlier.keys), known / blocks,
            before is not None and known >= len(earlier.keys) - 1, _log(before.gap) if before else 0,
            _log(earlier.answer_tokens), request.prompt_tokens % 512 / 512, _log(origin), _log(second),
        ]  # fmt: skip


def _prompts(requests: list[Request]) -> Accesses:
    """Blocks: length of prompt and answer, turn, times between turns, growth, what others share, place."""
    found, uses, last = Accesses(), Counter[Key](), dict[Key, _Turn]()
    for request in requests:
        keys, at = request.keys, len(found.of)
        known = next((place for place, key in enumerate(keys) if key not in last), len(keys))
        before = last[keys[known - 1]] if known and uses[keys[known - 1]] < SHARED else None
        turn = _Turn(request, at, before, owner=at)
        if before is not None:
            turn.number, turn.owner, turn.gap = before.number + 1, before.owner, at - before.at
        origin = max((uses[key] for key in keys[:known]), default=0)
        facts = turn.facts(known, origin, uses[keys[1]] if len(keys) > 1 else 0)
        here: dict[tuple[float, ...], int] = {}
        for place, key in enumerate(keys):
            uses[key] += 1
            last[key] = turn
            part = 0 if place < 2 else 1 if place < len(keys) // 2 else 2
            way = (_level(uses[key]), uses[key] == 1, place == len(keys) - 1, part)
            if way not in here:
                here[way] = found.add([*facts, *way], turn.owner, at)
            found.of.append(here[way])
    return found


def _objects(requests: list[Request]) -> Accesses:
    """Objects: uses, age, the last six gaps, counts that decay at six speeds, the object before."""
    found = Accesses()
    previous: Key | None = None
    gaps, last, first = defaultdict[Key, list[int]](list), dict[Key, int](), dict[Key, int]()
    counts = defaultdict[Key, list[float]](lambda: [0.0] * 6)
    uses = Counter[Key]()
    for at, request in enumerate(requests):
        key = request.keys[0]
        if key in last:
            gap = at - last[key]
            gaps[key] = [gap, *gaps[key][:5]]
            counts[key] = [
                count * 2 ** (-gap / 2 ** (6 + 2 * speed)) for speed, count in enumerate(counts[key])
            ]
        counts[key] = [count + 1 for count in counts[key]]
        uses[key] += 1
        last[key] = at
        known = [*map(_log, gaps[key]), *[0.0] * (6 - len(gaps[key]))]
        beside = [_log(uses[previous]), _log(sum(gaps[previous][:1]))] if previous is not None else [0.0, 0.0]
        facts = [_log(uses[key]), _log(at - first.setdefault(key, at)), len(gaps[key]), *known]
        found.of.append(found.add([*facts, *map(_log, counts[key]), *beside], first[key], at))
        previous = key
    return found


def _uses_and_time(keys: list[Key], accesses: Accesses) -> tuple[Array, Array]:
    """By access and age: uses of its keys, and lookups that its keys passed at that age."""
    following, lookups = dict[Key, int](), len(keys)
    until = np.zeros(lookups)
    used = np.zeros(lookups, bool)
    for place in range(lookups - 1, -1, -1):
        used[place] = keys[place] in following
        until[place] = following.get(keys[place], lookups)
        following[keys[place]] = place
    of, start = np.array(accesses.of), np.array(accesses.at)
    age = until - start[of]
    uses, time = np.zeros((len(start), AGES)), np.zeros((len(start), AGES))
    np.add.at(uses, (of[used], _bin(age[used])), 1)
    for number in range(AGES):
        passed = np.clip(np.minimum(age, EDGES[number + 1]) - EDGES[number], 0, None)
        np.add.at(time[:, number], of, passed)
    return uses, time


def _bin(age: Array) -> Array:
    return np.asarray(np.minimum((2 * np.log2(1 + age)).astype(int), AGES - 1))


def _fitted(facts: Array, uses: Array, time: Array, train: Array, seed: int) -> Array:
    """Rates of use of every access by age, by a network fitted to those of `train` (Poisson likelihood)."""
    torch.manual_seed(seed)
    seen = facts[train]
    inputs = torch.tensor((facts - seen.mean(0)) / (seen.std(0) + 1e-6), dtype=torch.float32)
    mean = torch.tensor(np.log((uses[train].sum(0) + 1) / (time[train].sum(0) + 1e5)), dtype=torch.float32)
    head = nn.Linear(WIDTH, AGES)
    with torch.no_grad():
        head.weight.mul_(0.1)
        head.bias.zero_()
    first = nn.Linear(inputs.shape[1], WIDTH)
    network = nn.Sequential(first, nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), head)
    size = np.sqrt(np.maximum(1, time[train][:, :1]))  # a long prompt is not as many independent events
    there = torch.tensor(np.flatnonzero(train))
    events, exposed = (torch.tensor(part[train] / size, dtype=torch.float32) for part in (uses, time))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(0, len(there), (min(BATCH, len(there)),))
        change = network(inputs[there[batch]])
        rate = mean + change
        likelihood = (torch.exp(rate) * exposed[batch] - events[batch] * rate).sum() / len(batch)
        rough = (change[:, 1:] - change[:, :-1]).pow(2).mean()
        loss = likelihood + 0.05 * rough + 0.01 * change.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return np.asarray(torch.exp(mean + network(inputs)))


def rates(keys: list[Key], accesses: Accesses) -> Array:
    """Rates of use by access and age, from networks that know nothing of the access's owner."""
    uses, time = _uses_and_time(keys, accesses)
    facts = np.array(accesses.facts, np.float32)
    fold = np.random.default_rng(1).permutation(max(accesses.owner) + 1)[accesses.owner] % FOLDS
    found = np.zeros_like(uses)
    for number in range(FOLDS):
        others = fold != number
        fits = [_fitted(facts, uses, time, others, seed) for seed in range(NETWORKS)]
        found[~others] = np.mean(fits, 0)[~others]
    return found


def indices(rate: Array) -> Array:
    """By access and age: the most uses per lookup, over all horizons; a use ends it."""
    width, found = np.diff(EDGES), np.zeros_like(rate)
    for begin in range(AGES):
        unused, used, passed = np.ones(len(rate)), np.zeros(len(rate)), np.zeros(len(rate))
        for age in range(begin, AGES):
            part = -np.expm1(-rate[:, age] * width[age])
            passed += unused * np.where(part > 1e-6, part / np.maximum(rate[:, age], 1e-12), width[age])
            used += unused * part
            unused *= 1 - part
            found[:, begin] = np.maximum(found[:, begin], used / passed)
    return found


class Cache:
    """Evicts the last key of the resident access with the lowest index."""

    def __init__(self, capacity: int, accesses: Accesses, index: Array) -> None:
        self._capacity, self._index, self._at = capacity, index, np.array(accesses.at)
        self._access: dict[Key, int] = {}
        self._keys: dict[int, dict[Key, None]] = {}
        self._lowest: list[int] = []
        self._compared = -COMPARE_EVERY

    def use(self, key: Key, access: int, now: int) -> bool:
        """Whether the key was resident; from now on it belongs to this access."""
        hit = key in self._access
        if hit or len(self._access) >= self._capacity:
            self._remove(key if hit else next(reversed(self._keys[self._victim(now)])))
        self._access[key] = access
        self._keys.setdefault(access, {})[key] = None
        return hit

    def _remove(self, key: Key) -> None:
        access = self._access.pop(key)
        del self._keys[access][key]
        if not self._keys[access]:
            del self._keys[access]

    def _victim(self, now: int) -> int:
        while self._lowest and self._lowest[-1] not in self._keys:
            self._lowest.pop()
        if not self._lowest or now - self._compared >= COMPARE_EVERY:
            resident = np.fromiter(self._keys, int, len(self._keys))
            index = self._index[resident, _bin(now - self._at[resident])]
            self._lowest = resident[np.argsort(index, kind="stable")][: 2 * COMPARE_EVERY][::-1].tolist()
            self._compared = now
        return self._lowest[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("capacity", type=positive, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recording: KeyTrace = read(given.trace)
    keys = [key for request in recording.requests for key in request.keys]
    accesses = (_prompts if recording.blocks else _objects)(recording.requests)
    index = indices(rates(keys, accesses))
    for capacity in given.capacity:
        cache = Cache(capacity, accesses, index)
        lookups = zip(keys, accesses.of, strict=True)
        hits = sum(cache.use(key, access, now) for now, (key, access) in enumerate(lookups))
        lru, ours, best = (
            simulation.run(policy, recording, capacity).hits for policy in ("lru", "moe", "belady")
        )
        shares = [f"{100 * found / len(keys):.2f}" for found in (lru, ours, hits, best)]
        print(
            f"{given.trace.name} {capacity:>6}: lru {shares[0]}  moe {shares[1]}  bound {shares[2]}  "
            f"belady {shares[3]} %; bound closes {100 * (hits - lru) / max(1, best - lru):.1f} % of the gap",
            flush=True,
        )


if __name__ == "__main__":
    run(main, TraceError)
