"""The operator's mind: (deployment, observed, now) -> Plan. Everything that is decided is decided here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from moe_operator.manifests import changes, children, conditions, rollout, state, worker
from moe_operator.manifests.conditions import Verdict
from moe_operator.manifests.decision import Decision
from moe_operator.manifests.objects import Key, Manifest, belongs, key
from moe_operator.manifests.observed import Observed, leaders
from moe_operator.manifests.rollout import Step
from moe_operator.manifests.state import State
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Identity
from moe_operator.resources.status import PROGRESSING, READY, Condition, Status


@dataclass(frozen=True)
class Deletion:
    """An object to delete; the UID guards one of the same name that somebody made since."""

    key: Key
    uid: str


@dataclass(frozen=True)
class Plan:
    """What to do now."""

    apply: tuple[Manifest, ...]
    """Objects to apply, in this order."""
    delete: tuple[Deletion, ...]
    """Objects to delete, in this order."""
    status: Status
    decisions: tuple[Decision, ...]
    recheck: bool
    """Something is awaited that sends no event: look again soon."""

    @property
    def creates(self) -> bool:
        """Whether it makes objects; changes of those that are there name their UID."""
        return any("uid" not in manifest["metadata"] for manifest in self.apply)


def plan(deployment: Deployment, observed: Observed, now: datetime) -> Plan:
    """What to do now so that the cluster gets closer to the deployment."""
    desired = [*children.shared(deployment), *children.replicas(deployment)]
    foreign = _foreign(desired, observed, deployment.identity)
    revision = worker.revision(deployment)
    current = state.read(deployment, observed, revision, tuple(str(found) for found in foreign))
    steps = rollout.steps(current.replicas, current.wanted, revision)
    waiting = [rank for rank, step in steps.items() if step is Step.WAIT]
    held = {Key("StatefulSet", names.replica(deployment.name, rank)) for rank in waiting}
    candidates = (manifest for manifest in desired if key(manifest) not in {*held, *foreign})
    made = changes.changes(candidates, observed, deployment)
    status = _status(deployment, current, now)
    deletions = _deletions(deployment, observed, current)
    return Plan(
        apply=tuple(change.manifest for change in made),
        delete=deletions,
        status=status,
        decisions=(
            *changes.decisions(made),
            *(_removal(gone, current.wanted) for gone in deletions),
            *transitions(deployment.status, status),
        ),
        recheck=observed.model is None and model_address(deployment, observed) is not None,
    )


def model_address(deployment: Deployment, observed: Observed) -> str | None:
    """IP address of a worker to ask for its model; None when there is none or the answer is known."""
    revision = worker.revision(deployment)
    known = deployment.status.model
    if known is not None and known.revision == revision:
        return None
    pods = leaders(observed).values()
    return next((pod.address for pod in pods if pod.ready and pod.revision == revision and pod.address), None)


def _foreign(desired: Iterable[Manifest], observed: Observed, owner: Identity) -> list[Key]:
    """Wanted names that objects of somebody else have; those are never touched."""
    found = (key(manifest) for manifest in desired)
    return [
        name for name in found if name in observed.children and not belongs(observed.children[name], owner)
    ]


def _deletions(deployment: Deployment, observed: Observed, current: State) -> tuple[Deletion, ...]:
    gone = []
    for rank in rollout.surplus(current.replicas, current.wanted):
        name = Key("StatefulSet", names.replica(deployment.name, rank))
        if name in observed.children:
            gone.append(Deletion(name, observed.children[name]["metadata"]["uid"]))
    return tuple(gone)


def _removal(gone: Deletion, wanted: int) -> Decision:
    return Decision("ReplicaRemoved", f"deleting {gone.key}: {wanted} wanted")


def _status(deployment: Deployment, current: State, now: datetime) -> Status:
    generation = deployment.identity.generation
    return Status(
        observed_generation=generation,
        desired_replicas=current.wanted,
        replicas=sum(not pod.terminating for pod in current.leaders.values()),
        ready_replicas=current.ready,
        updated_replicas=current.updated,
        selector=names.selector_text(names.leader_labels(deployment.name)),
        revision=current.revision,
        model=current.model,
        conditions=conditions.dated(conditions.verdicts(current), deployment.status, generation, now),
    )


def transitions(before: Status, after: Status) -> list[Decision]:
    """A decision for every condition that changed its status or its reason; equal ones count once."""
    changed = []
    for condition in after.conditions:
        old = before.condition(condition.type)
        if old is None or (old.status, old.reason) != (condition.status, condition.reason):
            changed.append(condition)
    told = (_announcement(condition) for condition in changed if condition.type in (READY, PROGRESSING))
    return list(dict.fromkeys(told))


_EXPECTED = ("Complete", "ReplicasNotReady", "FrontendNotReady", "ScaledToZero")
"""Reasons of a condition that is False without anything being wrong."""


def _announcement(condition: Condition) -> Decision:
    trouble = condition.status == "False" and condition.reason not in _EXPECTED
    return Decision(condition.reason, condition.message, warning=trouble)


def invalid(before: Status, identity: Identity, message: str, now: datetime) -> Status:
    """The status of a deployment whose spec cannot be understood: nothing else is known of it."""
    verdict = Verdict(False, "InvalidSpec", message)
    after = before.without_scaling()
    return _stuck(before, after, identity.generation, {READY, PROGRESSING}, verdict, now)


def refused(before: Status, planned: Status, message: str, now: datetime) -> Status:
    """The planned status when the API server refused a part of the plan.

    Nothing goes on; but replicas that answer requests still do, so a Ready that is True stays.
    """
    ready = planned.condition(READY)
    kinds = {PROGRESSING} if ready is not None and ready.status == "True" else {READY, PROGRESSING}
    verdict = Verdict(False, "ApplyRefused", message)
    return _stuck(before, planned, planned.observed_generation or 0, kinds, verdict, now)


def _stuck(
    before: Status, after: Status, generation: int, kinds: set[str], verdict: Verdict, now: datetime
) -> Status:
    stuck = conditions.dated(dict.fromkeys(sorted(kinds), verdict), before, generation, now)
    kept = tuple(condition for condition in after.conditions if condition.type not in kinds)
    return after.model_copy(update={"observed_generation": generation, "conditions": (*stuck, *kept)})
