"""`moe`: LRU-K whose K, correlated-reference period and history weigh as much as they have proved worth.

Every key belongs to a class: how often it was used (K, in levels) and, for keys used rarely, what is known
of the access (`kind`). The policy measures how often keys of each class and age are used again, resident or
evicted (the history, a ghost list): uses / (keys x accesses), a hazard. Ages are octaves of accesses since
the last use. A class whose uses come in bursts has a hazard that drops after the burst (the correlated
reference period); one that is reused late keeps its hazard. The victim is the least recently used key of the
class whose oldest key is expected to be used at the lowest rate soon.

Ranking by measured rate of use and age follows Beckmann, Chen, Cidon: LHD: Improving Cache Hit Rate by
Maximizing Hit Density, NSDI 2018; LRU-K with retained history is O'Neil et al., SIGMOD 1993. Unlike LHD's,
the candidates are the oldest keys of the classes, no random sample: a trace always gives the same evictions.
"""

import math
from collections import OrderedDict
from itertools import islice
from typing import Final, Generic

from moe_api.caching.policy import ANSWERS, KINDS, K

_LEVELS: Final = (0, 1, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5)
"""Level of a number of uses; 6 from 16 on."""
_TOP_LEVEL: Final = 6
_USES_MOST: Final = len(_LEVELS)
_OCTAVES: Final = 40
_HISTORY: Final = 3
"""Evicted keys that are remembered, as a multiple of the capacity."""
_PRIOR_USES: Final = 5.0
"""A class starts with this many uses at the rate of all classes together."""
_MEMORY: Final = 60_000
"""Measurements lose half of their weight in some 40,000 accesses, or in 3 x capacity where that is more."""
_CAPACITIES: Final = 4
_FIT_LEAST: Final = 1024
_FIT_SHARE: Final = 4
"""The measurements are taken in every capacity / 4 accesses."""
_SAMPLED: Final = 4
"""One key in this many is sampled then."""
_WINDOWS: Final = (0.5, 1.0, 2.0)
"""How far to look ahead, as multiples of the capacity: what counts is the best rate of use among these."""
_REPICK: Final = 32
"""Evictions from one class before the classes are compared again."""


def _class_of(uses: int, kind: int) -> int:
    """New keys are told apart by all that is known of the access, keys used again by the answer only."""
    level = _LEVELS[uses] if uses < _USES_MOST else _TOP_LEVEL
    if level > 3:
        return level * KINDS
    return level * KINDS + (kind if level == 1 else kind % ANSWERS)


_CLASSES: Final = tuple(
    tuple(_class_of(uses, kind) for kind in range(KINDS)) for uses in range(_USES_MOST + 1)
)
"""Class by number of uses (_USES_MOST stands for more, too) and kind."""

_Rates = list[float]
_Entry = tuple[int, int, int]
"""Class, time of the last use, number of uses."""


class Adaptive(Generic[K]):
    """Adaptive LRU-K; see above. Bounded: keys and history take (1 + _HISTORY) x capacity entries."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._now = 0
        self._entries: dict[K, _Entry] = {}
        self._history: OrderedDict[K, _Entry] = OrderedDict()
        self._queues: dict[int, OrderedDict[K, None]] = {}
        self._uses: dict[int, _Rates] = {}
        self._exposure: dict[int, _Rates] = {}
        self._overall = [0.0] * _OCTAVES
        self._rates: dict[tuple[int, int], float] = {}
        self._windows = [max(1, int(capacity * share)) for share in _WINDOWS]
        self._fitted = 0
        self._next_fit = max(_FIT_LEAST, capacity // _FIT_SHARE)
        self._victims: OrderedDict[K, None] = OrderedDict()
        self._picks_left = 0

    def __len__(self) -> int:
        return len(self._entries)

    def hit(self, key: K, kind: int = 0) -> None:
        """As `Policy.hit`."""
        self._now = now = self._now + 1
        if now >= self._next_fit:
            self._fit()
        of, last, uses = self._entries[key]
        self._uses[of][(now - last).bit_length()] += 1.0
        uses += 1
        new = _CLASSES[min(uses, _USES_MOST)][kind]
        if new == of:
            self._queues[of].move_to_end(key)
        else:
            del self._queues[of][key]
            self._queue(new)[key] = None
        self._entries[key] = new, now, uses

    def evict(self, incoming: K) -> K:  # noqa: ARG002
        """As `Policy.evict`."""
        if not self._picks_left or not self._victims:
            self._pick()
        self._picks_left -= 1
        key, _ = self._victims.popitem(last=False)
        self._history[key] = self._entries.pop(key)
        if len(self._history) > _HISTORY * self._capacity:
            self._history.popitem(last=False)
        return key

    def admit(self, key: K, kind: int = 0) -> None:
        """As `Policy.admit`."""
        self._now = now = self._now + 1
        if now >= self._next_fit:
            self._fit()
        uses = 1
        if (before := self._history.pop(key, None)) is not None:
            of, last, uses = before
            self._uses[of][(now - last).bit_length()] += 1.0
            uses += 1
        of = _CLASSES[min(uses, _USES_MOST)][kind]
        self._queue(of)[key] = None
        self._entries[key] = of, now, uses

    def remove(self, key: K) -> None:
        """As `Policy.remove`."""
        entry = self._entries.pop(key)
        del self._queues[entry[0]][key]

    def _queue(self, of: int) -> OrderedDict[K, None]:
        queue = self._queues.get(of)
        if queue is None:
            self._uses[of] = [0.0] * _OCTAVES
            self._exposure[of] = [0.0] * _OCTAVES
            queue = self._queues[of] = OrderedDict()
        return queue

    def _pick(self) -> None:
        """Chooses the class that the next evictions come from. Raises KeyError where no key is resident."""
        worst: tuple[float, int] | None = None
        for of, queue in self._queues.items():
            if queue:
                last = self._entries[next(iter(queue))][1]
                rank = self._rate(of, (self._now - last).bit_length()), last
                if worst is None or rank < worst:
                    worst, self._victims = rank, queue
        if worst is None:
            raise KeyError("no key is resident")
        self._picks_left = min(_REPICK, max(1, self._capacity // _REPICK))

    def _rate(self, of: int, octave: int) -> float:
        """The highest rate of use of a key over one of the windows, from the beginning of the octave on."""
        rate = self._rates.get((of, octave))
        if rate is None:
            rate = max(self._uses_in(of, octave, window) / window for window in self._windows)
            self._rates[of, octave] = rate
        return rate

    def _uses_in(self, of: int, octave: int, window: int) -> float:
        """Uses of one key that are expected in so many accesses."""
        uses, exposure, expected = self._uses[of], self._exposure[of], 0.0
        begin = (1 << octave) >> 1
        end = begin + window
        while begin < end:
            until = min(1 << octave, end)
            if overall := self._overall[octave]:
                hazard = (uses[octave] + _PRIOR_USES) / (exposure[octave] + _PRIOR_USES / overall)
                expected += hazard * (until - begin)
            octave, begin = octave + 1, until
        return expected

    def _fit(self) -> None:
        """Takes the uses since the last fit into the expected rates of every class and age."""
        passed, self._fitted = self._now - self._fitted, self._now
        self._next_fit = self._now + max(_FIT_LEAST, self._capacity // _FIT_SHARE)
        kept = math.exp(-passed / max(_MEMORY, _CAPACITIES * self._capacity))
        for rates in (*self._uses.values(), *self._exposure.values()):
            rates[:] = [rate * kept for rate in rates]
        now, exposure = self._now, self._exposure
        weight, first = passed * _SAMPLED, now % _SAMPLED
        for entries in (self._entries, self._history):
            for of, last, _ in islice(entries.values(), first, None, _SAMPLED):
                exposure[of][(now - last).bit_length()] += weight
        used, seen = _sums(self._uses), _sums(self._exposure)
        self._overall = [uses / time if time else 0.0 for uses, time in zip(used, seen, strict=True)]
        self._rates.clear()
        self._picks_left = 0


def _sums(of_classes: dict[int, _Rates]) -> _Rates:
    return [sum(column) for column in zip(*of_classes.values(), strict=True)]
