"""Decides which replicas get the current revision now.

A replica that serves is taken down for a new revision only while every other one serves, so at most one is
missing at a time; replicas that do not serve anyway are brought up to date at once, which also is how a fixed
spec reaches replicas that a broken one left unable to start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Replica:
    """One replica as it is."""

    data_rank: int
    revision: str | None
    """Revision of its StatefulSet's template; None when there is no StatefulSet."""
    ready: bool
    """Its leader is Ready, and is of the StatefulSet's revision."""


class Step(Enum):
    """What to do with one replica."""

    CREATE = "make it"
    KEEP = "apply the revision it has already, which puts back what was changed by hand"
    UPDATE = "give it the current revision, which restarts it"
    WAIT = "leave it at its old revision for now"


def steps(replicas: Mapping[int, Replica], wanted: int, revision: str) -> dict[int, Step]:
    """What to do with each data rank in range(wanted), given those that are there.

    replicas: by data rank; missing ones are absent. revision: the one that all shall have.
    """
    present = {rank: replicas.get(rank, Replica(rank, None, ready=False)) for rank in range(wanted)}
    plan = {rank: _step(replica, revision) for rank, replica in present.items()}
    missing = [rank for rank, replica in present.items() if not replica.ready]
    waiting = [rank for rank, step in plan.items() if step is Step.WAIT]
    if waiting and not missing:
        plan[waiting[0]] = Step.UPDATE
    return plan


def _step(replica: Replica, revision: str) -> Step:
    if replica.revision is None:
        return Step.CREATE
    if replica.revision == revision:
        return Step.KEEP
    return Step.WAIT if replica.ready else Step.UPDATE


def surplus(data_ranks: Mapping[int, object], wanted: int) -> list[int]:
    """Data ranks to delete when fewer are wanted: the highest first."""
    return sorted((rank for rank in data_ranks if rank >= wanted), reverse=True)
