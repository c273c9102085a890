"""Decides which replicas are created and which are deleted now.

A replica keeps its revision; a new revision is created as new replicas. During a rollout `maxSurge`
additional replicas may exist, so that a new one is Ready before an old one is deleted. If a new one fits no
node (or maxSurge is 0), old ones in whose place it would fit are deleted first (several together if one is
not enough), as long as at most `maxUnavailable` of the wanted ones are missing. Old replicas that do not
serve are deleted at once, so that a corrected spec repairs a deployment that a wrong one broke. One that
served a moment ago stays for a while: its probe may only have been slow.

Among the candidates, the least busy one is deleted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from moe_operator.resources.rollout_spec import Rollout


@dataclass(frozen=True)
class Replica:
    """One replica as it is."""

    data_rank: int
    revision: str
    """Revision of its StatefulSet's template."""
    ready: bool
    """Its leader is Ready."""
    unplaced: bool = False
    """No node has had room for its pod for some time."""
    work: int = 0
    """Its active requests, if known."""
    lost: bool = False
    """Its pod should have ended, and its node does not report that it has."""
    makes_room: bool = False
    """A pod of the desired revision is known to fit in its place."""
    along: frozenset[int] = frozenset()
    """Data ranks of the replicas that must be deleted together with it for that."""
    faltering: bool = False
    """It is not ready, but was a moment ago."""


@dataclass(frozen=True)
class Terms:
    """The desired state."""

    wanted: int
    revision: str
    rollout: Rollout
    stalled: bool = False
    """The rollout's deadline has passed: serving replicas stay."""

    @property
    def held(self) -> bool:
        """Whether every replica keeps its revision for now."""
        return self.rollout.is_paused or self.stalled

    @property
    def needed(self) -> int:
        """Minimum number of serving replicas when old ones are deleted first."""
        return self.wanted - self.rollout.unavailable(self.wanted)


@dataclass(frozen=True)
class Moves:
    """What to do now."""

    create: int = 0
    """Replicas to create."""
    revision: str = ""
    """Their revision."""
    remove: tuple[Replica, ...] = ()
    """Replicas to delete, in this order."""
    chosen: bool = False
    """A choice among ready replicas was made: their load should be known."""
    candidates: tuple[Replica, ...] = ()
    """Old replicas that may be deleted if that frees enough room, which should be known; in order of
    preference.
    """


def moves(replicas: Collection[Replica], terms: Terms) -> Moves:
    """What to do with the existing replicas.

    New replicas replace lost ones: a StatefulSet creates no new pod until it knows that the old one ended.
    """
    lost = [replica for replica in replicas if replica.lost]
    found = _moves([replica for replica in replicas if not replica.lost], terms)
    return replace(found, remove=(*lost, *found.remove))


def _moves(replicas: Collection[Replica], terms: Terms) -> Moves:
    if all(replica.revision == terms.revision for replica in replicas):
        return _scale(replicas, terms.wanted, terms.revision)
    if terms.held:
        # New replicas that do not serve yet belong to the rollout and may still become ready.
        trying = [r for r in replicas if r.revision == terms.revision and not r.ready]
        others = [replica for replica in replicas if replica not in trying[: terms.rollout.max_surge]]
        return _scale(others, terms.wanted, _stable(replicas, terms))
    return _roll(replicas, terms)


def free_ranks(count: int, taken: Collection[int]) -> list[int]:
    """The `count` lowest free data ranks."""
    candidates = (rank for rank in range(count + len(taken)) if rank not in taken)
    return [rank for _, rank in zip(range(count), candidates, strict=False)]


def _scale(replicas: Collection[Replica], wanted: int, revision: str) -> Moves:
    surplus = max(len(replicas) - wanted, 0)
    leaving = _least_useful(replicas)[:surplus]
    return Moves(max(wanted - len(replicas), 0), revision, tuple(leaving), _was_choice(leaving, replicas))


def _stable(replicas: Collection[Replica], terms: Terms) -> str:
    """The old revision that most replicas have: a held rollout does not grow."""
    counts = Counter(replica.revision for replica in replicas if replica.revision != terms.revision)
    return max(counts, key=lambda revision: (counts[revision], revision))


def _roll(replicas: Collection[Replica], terms: Terms) -> Moves:
    current = [replica for replica in replicas if replica.revision == terms.revision]
    old = [replica for replica in replicas if replica.revision != terms.revision]
    staying = min(terms.rollout.partition, terms.wanted, len(old))
    dead = [replica for replica in old if not (replica.ready or replica.faltering)][: len(old) - staying]
    alive = [replica for replica in old if replica not in dead]
    leaving, candidates = _leaving(alive, len(alive) - staying, replicas, terms)
    no_room = any(replica.unplaced for replica in current)
    surge = 0 if no_room or len(alive) == staying else terms.rollout.max_surge
    limit = terms.wanted + surge
    kept = [replica for replica in replicas if replica not in dead and replica not in leaving]
    surplus = _least_useful(kept)[: max(len(kept) - limit, 0)] if surge == 0 and not no_room else []
    missing = terms.wanted - staying - len(current)
    create = max(min(missing, limit - len(current) - len(alive)), 0)
    chosen = _was_choice(leaving, alive)
    return Moves(create, terms.revision, (*dead, *leaving, *surplus), chosen, tuple(candidates))


def _leaving(
    alive: list[Replica], most: int, replicas: Collection[Replica], terms: Terms
) -> tuple[list[Replica], list[Replica]]:
    """Old replicas to delete now, up to a maximum, and the candidates for freeing room."""
    serving = sum(replica.ready for replica in replicas)
    replaced = _least_useful(alive)[: min(most, max(serving - terms.wanted, 0))]
    in_place = terms.rollout.max_surge == 0 or any(
        replica.unplaced for replica in replicas if replica.revision == terms.revision
    )
    more = min(most, max(serving - terms.needed, 0)) - len(replaced) if in_place else 0
    candidates = [replica for replica in _least_useful(alive) if replica not in replaced] if more > 0 else []
    return [*replaced, *_making_room(candidates, more)], candidates


def _making_room(candidates: list[Replica], most: int) -> list[Replica]:
    """Replicas to delete for new ones, at most `most`: first single ones, then groups, each as a whole."""
    by_rank = {replica.data_rank: replica for replica in candidates}
    chosen: list[Replica] = []
    for replica in sorted(candidates, key=lambda replica: len(replica.along)):
        if not replica.makes_room or not replica.along <= by_rank.keys():
            continue
        group = [by_rank[rank] for rank in (replica.data_rank, *sorted(replica.along))]
        group = [one for one in group if one not in chosen]
        if len(chosen) + len(group) <= most:
            chosen += group
    return chosen


def _least_useful(replicas: Iterable[Replica]) -> list[Replica]:
    """First those that do not serve, then by load, then the highest rank."""
    return sorted(replicas, key=lambda replica: (replica.ready, replica.work, -replica.data_rank))


def _was_choice(leaving: Collection[Replica], candidates: Collection[Replica]) -> bool:
    return any(replica.ready for replica in leaving) and len(leaving) < len(candidates)
