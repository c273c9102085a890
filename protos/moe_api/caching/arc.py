"""ARC. Megiddo, Modha: ARC: A Self-Tuning, Low Overhead Replacement Cache, FAST 2003."""

from collections import OrderedDict
from typing import Generic

from moe_api.caching.policy import K


class ARC(Generic[K]):
    """Balances recency and frequency by the hits among the names of evicted keys.

    T1 holds keys used once, T2 those used more often, B1 and B2 the names evicted from them; `target` is the
    size that T1 should have. Names as in the paper.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._t1: OrderedDict[K, None] = OrderedDict()
        self._t2: OrderedDict[K, None] = OrderedDict()
        self._b1: OrderedDict[K, None] = OrderedDict()
        self._b2: OrderedDict[K, None] = OrderedDict()
        self._target = 0.0

    def __len__(self) -> int:
        return len(self._t1) + len(self._t2)

    def hit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.hit`."""
        if key in self._t1:
            del self._t1[key]
            self._t2[key] = None
        else:
            self._t2.move_to_end(key)

    def evict(self, incoming: K) -> K:
        """As `Policy.evict`."""
        if not len(self):
            raise KeyError("no key is resident")
        self._adapt(incoming)
        known = incoming in self._b1 or incoming in self._b2
        if not known and len(self._t1) >= self._capacity:
            return self._t1.popitem(last=False)[0]
        return self._replace(in_b2=incoming in self._b2)

    def admit(self, key: K, kind: int = 0) -> None:  # noqa: ARG002
        """As `Policy.admit`."""
        if key in self._b1 or key in self._b2:
            self._b1.pop(key, None)
            self._b2.pop(key, None)
            self._t2[key] = None
        else:
            self._t1[key] = None
        self._forget()

    def remove(self, key: K) -> None:
        """As `Policy.remove`."""
        if key in self._t1:
            del self._t1[key]
        else:
            del self._t2[key]

    def _adapt(self, incoming: K) -> None:
        if incoming in self._b1:
            self._target = min(self._capacity, self._target + max(1.0, len(self._b2) / len(self._b1)))
        elif incoming in self._b2:
            self._target = max(0.0, self._target - max(1.0, len(self._b1) / len(self._b2)))

    def _replace(self, *, in_b2: bool) -> K:
        size = len(self._t1)
        from_t1 = size > 0 and (size > self._target or (in_b2 and size == self._target))
        resident, ghosts = (self._t1, self._b1) if from_t1 or not self._t2 else (self._t2, self._b2)
        key = resident.popitem(last=False)[0]
        ghosts[key] = None
        return key

    def _forget(self) -> None:
        """|T1| + |B1| is at most the capacity, and all four together at most twice that."""
        while self._b1 and len(self._t1) + len(self._b1) > self._capacity:
            self._b1.popitem(last=False)
        while self._b2 and len(self) + len(self._b1) + len(self._b2) > 2 * self._capacity:
            self._b2.popitem(last=False)
