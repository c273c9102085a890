"""A scaler's memory as a ScalingHistory: it belongs to the deployment and outlives the operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from moe_operator.autoscaling.model.capacity import Capacity
from moe_operator.autoscaling.model.history import History, HistoryError
from moe_operator.autoscaling.model.horizon import ColdStarts
from moe_operator.autoscaling.scaler import Memory
from moe_operator.render.objects import Manifest, child, owner_uid
from moe_operator.resources import names
from moe_operator.resources.base import Model
from moe_operator.resources.deployment import Identity

_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Capacity(Model):
    model_config = ConfigDict(extra="ignore")
    per_replica: _Rate
    prior: _Rate
    findings: int = Field(default=0, ge=0)


class _Content(Model):
    model_config = ConfigDict(extra="ignore")
    rates: str
    cold_start_seconds: tuple[_Seconds, ...] = ()
    measured_pods: tuple[str, ...] = ()
    capacity: _Capacity


def manifest(owner: Identity, memory: Memory, pods: Iterable[str]) -> Manifest:
    """The object that keeps a memory; of measured pods only those that are still there (their UIDs)."""
    content = _Content(
        rates=memory.history.dump(),
        cold_start_seconds=memory.cold_starts.seconds,
        measured_pods=tuple(sorted(memory.measured.intersection(pods))),
        capacity=_Capacity(
            per_replica=memory.capacity.per_replica,
            prior=memory.capacity.prior,
            findings=memory.capacity.findings,
        ),
    )
    return {
        **child(owner, names.API_VERSION, names.HISTORY_KIND, owner.name, "scaling"),
        **content.manifest(),
    }


def memory(kept: Mapping[str, Any] | None, owner: Identity) -> Memory | None:
    """What an object kept; None where there is none, or it is of an earlier deployment of the same name.

    Raises:
        HistoryError: it is damaged.
    """
    if kept is None or owner_uid(kept) != owner.uid:
        return None
    try:
        content = _Content.model_validate(
            {name: value for name, value in kept.items() if name not in ("apiVersion", "kind", "metadata")}
        )
    except ValidationError as error:
        raise HistoryError(
            f"the stored history is damaged: {error.error_count()} fields are wrong"
        ) from error
    return Memory(
        History.load(content.rates),
        ColdStarts(content.cold_start_seconds),
        frozenset(content.measured_pods),
        Capacity(content.capacity.per_replica, content.capacity.prior, content.capacity.findings),
    )
