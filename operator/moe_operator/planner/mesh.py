"""Reports of gang leaders about their ranks, and the part of the status that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moe_operator.planner.gangs import Gang
from moe_operator.resources.status import GangStatus, MeshStatus, StageStatus

_SHOWN: Final = 100
"""Gangs in the status, at most."""
_THRESHOLD: Final = 120
"""Threshold of the imbalance in percent, if spec.parallelism.rebalance sets none."""


@dataclass(frozen=True)
class Balance:
    """The layer whose ranks differ most in load."""

    layer: int
    rank: int
    """The busiest, by its number in its stage."""
    percentage: int
    """Its load in percent of the mean of the stage's ranks."""


@dataclass(frozen=True)
class MeshReading:
    """The report of one leader about its gang."""

    epoch: int
    stages: tuple[tuple[int, int], ...]
    """First layer and number of layers of each stage."""
    balance: Balance | None
    """None if no tokens were counted, or experts are not spread."""


def balance(layers: Iterable[tuple[int, Sequence[float]]]) -> Balance | None:
    """The worst of some layers, each with its number and the load of each rank of its stage."""
    found = [
        Balance(layer, loads.index(max(loads)), round(100 * max(loads) * len(loads) / sum(loads)))
        for layer, loads in layers
        if len(loads) > 1 and sum(loads) > 0
    ]
    return max(found, key=lambda one: one.percentage, default=None)


def status(gangs: Mapping[int, Gang], readings: Mapping[str, MeshReading], shape: str) -> MeshStatus | None:
    """The part of the status about gangs; None if there are none."""
    if not gangs:
        return None
    rows = [_row(gang, _reading(gang, readings)) for gang in gangs.values()]
    known = next((found for gang in gangs.values() if (found := _reading(gang, readings))), None)
    stages = () if known is None else known.stages
    return MeshStatus(
        shape=shape,
        ranks=sum(row.ranks for row in rows),
        ready_ranks=sum(row.ready_ranks for row in rows),
        stages=tuple(StageStatus(first_layer=first, layers=layers) for first, layers in stages),
        gangs=tuple(rows[:_SHOWN]),
    )


def _reading(gang: Gang, readings: Mapping[str, MeshReading]) -> MeshReading | None:
    return None if gang.leader is None else readings.get(gang.leader.name)


def _row(gang: Gang, reading: MeshReading | None) -> GangStatus:
    worst = None if reading is None else reading.balance
    return GangStatus(
        name=gang.name,
        ranks=gang.size,
        ready_ranks=gang.ready,
        epoch=0 if reading is None else reading.epoch,
        restarts=gang.restarts,
        imbalance_percentage=None if worst is None else worst.percentage,
        layer=None if worst is None else worst.layer,
        busiest_rank=None if worst is None else worst.rank,
    )


def worst(found: MeshStatus) -> GangStatus | None:
    """The gang with the largest imbalance; None if none was measured."""
    measured = [gang for gang in found.gangs if gang.imbalance_percentage is not None]
    return max(measured, key=lambda gang: gang.imbalance_percentage or 0, default=None)


def threshold(stated: int | None) -> int:
    """The imbalance in percent above which experts count as not balanced."""
    return _THRESHOLD if stated is None else stated
