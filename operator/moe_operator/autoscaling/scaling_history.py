"""The state of a scaler as ScalingHistory objects, which belong to the deployment and outlive the operator.

etcd stores each version of an object as a whole. So the operator writes the 14 days (tens of KiB) every 6
hours, and every few minutes a second object with the minutes since then (1 to 2 KiB).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError

from moe_operator.autoscaling.model.capacity import Capacity
from moe_operator.autoscaling.model.history import History, HistoryError
from moe_operator.autoscaling.model.horizon import ColdStarts
from moe_operator.autoscaling.scaler import Memory
from moe_operator.render.objects import Manifest, child, key, owner_uid
from moe_operator.resources import names
from moe_operator.resources.base import Model
from moe_operator.resources.deployment import Identity

WHOLE_MINUTES: Final = 360
"""Maximum minutes in the object of the latest minutes; then the whole history is written again."""

_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Capacity(Model):
    per_replica: _Rate
    prior: _Rate
    findings: int = Field(default=0, ge=0)


class _Content(Model):
    rates: str
    cold_start_seconds: tuple[_Seconds, ...] = ()
    measured_pods: tuple[str, ...] = ()
    capacity: _Capacity


@dataclass(frozen=True)
class Due:
    """The object to write now."""

    manifest: Manifest
    whole_until: int
    """After this write, the stored whole history has all rates before this minute."""


def due(owner: Identity, memory: Memory, pods: Iterable[str], whole_until: int) -> Due:
    """The whole history if it is missing or 6 hours old, else the minutes since it was written.

    Args:
        owner: the deployment.
        memory: the state to store.
        pods: UIDs of the leaders that exist.
        whole_until: of the last write; 0 if there is none.
    """
    end = memory.history.end
    if not whole_until or end - whole_until >= WHOLE_MINUTES:
        return Due(manifest(owner, memory, pods), end)
    recent = replace(memory, history=memory.history.since(whole_until))
    named = manifest(owner, recent, pods, names.recent_history(owner.name))
    return Due(named, whole_until)


def manifest(owner: Identity, memory: Memory, pods: Iterable[str], name: str = "") -> Manifest:
    """The object that stores a state; of the measured pods it lists only those that still exist, by UID."""
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
        **child(owner, names.API_VERSION, names.HISTORY_KIND, name or owner.name, "scaling"),
        **content.manifest(),
    }


def memory(kept: Mapping[str, Any] | None, owner: Identity) -> Memory | None:
    """The state in the whole history; None if there is none, or it is of an earlier deployment of the name.

    Raises:
        HistoryError: the object is invalid; the message names it, and its first invalid field.
    """
    whole = _memory(kept, owner)
    return None if whole is None else replace(whole, whole_until=whole.history.end)


def with_recent(whole: Memory, recent: Mapping[str, Any] | None, owner: Identity) -> Memory:
    """The state in the whole history and the minutes since then.

    Raises:
        HistoryError: as `memory`, about the object of the latest minutes; the whole history is still good.
    """
    later = _memory(recent, owner)
    if later is None or later.history.end <= whole.history.end:
        return whole
    whole.history.extend(later.history)
    return replace(later, history=whole.history, whole_until=whole.whole_until)


def without_future(known: Memory, minute: int) -> Memory:
    """The state without rates after a minute, the current one: a clock that was ahead has dated them.

    No later rate would be taken before that time comes. The whole history is then written again.
    """
    history = known.history
    if history.end <= minute + 1:
        return known
    return replace(known, history=history.until(minute + 1), whole_until=0)


def _memory(kept: Mapping[str, Any] | None, owner: Identity) -> Memory | None:
    if kept is None or owner_uid(kept) != owner.uid:
        return None
    try:
        content = _Content.model_validate(
            {name: value for name, value in kept.items() if name not in ("apiVersion", "kind", "metadata")}
        )
        history = History.load(content.rates)
    except (ValidationError, HistoryError) as error:
        why = _first(error) if isinstance(error, ValidationError) else str(error)
        raise HistoryError(f"{key(kept)} is invalid: {why}") from error
    return Memory(
        history,
        ColdStarts(content.cold_start_seconds),
        frozenset(content.measured_pods),
        Capacity(content.capacity.per_replica, content.capacity.prior, content.capacity.findings),
    )


def _first(error: ValidationError) -> str:
    """The first violation, and how many more there are."""
    problem, more = error.errors(include_input=False)[0], error.error_count() - 1
    field = ".".join(map(str, problem["loc"]))
    return f"{field}: {problem['msg']}" + (f" (and {more} more)" if more else "")
