"""The status that a reconcile writes, of a plan or of a blocked deployment, and what changed in it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from moe_operator.planner import conditions
from moe_operator.planner.conditions import Verdict
from moe_operator.planner.decision import Decision
from moe_operator.planner.state import State
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Identity
from moe_operator.resources.status import (
    DEPRECATED_FIELDS,
    PROGRESSING,
    READY,
    RECONCILING,
    STALLED,
    Condition,
    Status,
)


def of_plan(deployment: Deployment, current: State, now: datetime) -> Status:
    """The status of a deployment whose state could be observed."""
    generation = deployment.identity.generation
    return Status(
        observed_generation=generation,
        desired_replicas=current.wanted,
        replicas=sum(not pod.terminating for pod in current.leaders.values()),
        ready_replicas=current.ready,
        updated_replicas=current.updated,
        selector=names.selector_text(names.leader_labels(deployment.name)),
        revision=current.revision,
        restarted_at=deployment.restarted_at or None,
        rollout=current.progress,
        model=current.model,
        mesh=current.mesh,
        conditions=conditions.dated(conditions.verdicts(current), deployment.status, generation, now),
    )


def transitions(before: Status, after: Status) -> list[Decision]:
    """A decision for every condition whose change is worth an Event; equal ones count once."""
    changed = (one for one in after.conditions if _is_news(before.condition(one.type), one))
    told = (_announcement(condition) for condition in changed if condition.type in _ANNOUNCED)
    return list(dict.fromkeys(told))


def _is_news(old: Condition | None, new: Condition) -> bool:
    """Whether the status or the reason changed, or the edit of a spec changed what is wrong.

    Messages alone change often, because they count replicas.
    """
    if old is None or (old.status, old.reason) != (new.status, new.reason):
        return True
    edited = old.observed_generation != new.observed_generation
    return edited and _is_warning(new) and old.message != new.message


_ANNOUNCED = (READY, PROGRESSING, DEPRECATED_FIELDS)
"""Conditions whose changes become Events."""
_EXPECTED = ("ReplicasNotReady", "FrontendNotReady")
"""Reasons of a condition that is False without a problem."""


def _announcement(condition: Condition) -> Decision:
    return Decision(condition.reason, condition.message, warning=_is_warning(condition))


def _is_warning(condition: Condition) -> bool:
    """Whether it is bad news: a Progressing that is Unknown is paused on purpose."""
    if condition.type == DEPRECATED_FIELDS:
        return True
    bad = ("False", "Unknown") if condition.type == READY else ("False",)
    return condition.status in bad and condition.reason not in _EXPECTED


def invalid(before: Status, identity: Identity, message: str, now: datetime) -> Status:
    """The status of a deployment with an invalid spec; nothing else is known about it."""
    verdict = Verdict(False, "InvalidSpec", message)
    after = before.without_scaling()
    return _stuck(before, after, identity.generation, {READY, PROGRESSING}, verdict, now)


def refused(
    before: Status, planned: Status, message: str, now: datetime, reason: str = "ApplyRefused"
) -> Status:
    """The planned status when the API server refused a part of the plan.

    The rollout stops, but ready replicas still serve, so a Ready that is True stays.
    """
    ready = planned.condition(READY)
    serves = ready is not None and ready.status == "True" and planned.ready_replicas > 0
    kinds = {PROGRESSING} if serves else {READY, PROGRESSING}
    verdict = Verdict(False, reason, message)
    return _stuck(before, planned, planned.observed_generation or 0, kinds, verdict, now)


def _stuck(
    before: Status, after: Status, generation: int, kinds: set[str], verdict: Verdict, now: datetime
) -> Status:
    """The status `after`, with conditions of some kinds that say what blocks the deployment.

    Whatever an earlier generation's conditions say is Unknown at this generation.
    """
    blocked = {**dict.fromkeys(sorted(kinds), verdict), **conditions.abnormal(verdict)}
    others = [one for one in after.conditions if one.type not in {*blocked, RECONCILING, STALLED}]
    current = [one for one in others if one.observed_generation == generation]
    unknown = {
        one.type: replace(verdict, holds=None)
        for one in others
        if one not in current and one.type != DEPRECATED_FIELDS
    }
    found = conditions.dated({**blocked, **unknown}, before, generation, now)
    return after.model_copy(update={"observed_generation": generation, "conditions": (*found, *current)})
