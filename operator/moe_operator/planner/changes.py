"""Which objects have to be applied, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from moe_operator.observed.children import Child
from moe_operator.observed.observation import Observed
from moe_operator.planner import drift
from moe_operator.planner.decision import Decision
from moe_operator.render.objects import Manifest, applied_digest, key
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.status import COMPLETE, PROGRESSING


class Why(Enum):
    """Why an object is applied."""

    CREATED = "Created"
    RECREATED = "Recreated"
    UPDATED = "Updated"
    DRIFT_CORRECTED = "DriftCorrected"


@dataclass(frozen=True)
class Change:
    """An object to apply."""

    manifest: Manifest
    why: Why
    place: str = ""
    """Path of the field that was changed by hand, for DRIFT_CORRECTED."""


def changes(desired: Iterable[Manifest], observed: Observed, deployment: Deployment) -> list[Change]:
    """The objects that are missing or differ, in the given order."""
    found = (_change(manifest, observed, deployment) for manifest in desired)
    return [change for change in found if change is not None]


def _change(manifest: Manifest, observed: Observed, deployment: Deployment) -> Change | None:
    actual = observed.children.get(key(manifest))
    if actual is None:
        # A lost replica is not recreated: another one replaces it.
        again = manifest["kind"] != "StatefulSet" and _was_complete(deployment)
        return Change(manifest, Why.RECREATED if again else Why.CREATED)
    guarded = _guarded(manifest, actual)
    if actual.applied_digest != applied_digest(manifest):
        return Change(guarded, Why.UPDATED)
    place = drift.first_difference(manifest, actual.content, owned=actual.owned_fields)
    return None if place is None else Change(guarded, Why.DRIFT_CORRECTED, place)


def _guarded(manifest: Manifest, actual: Child) -> Manifest:
    """The object with the UID of the one it changes, so that a newer one of its name is never changed."""
    return {**manifest, "metadata": {**manifest["metadata"], "uid": actual.uid}}


def _was_complete(deployment: Deployment) -> bool:
    """Whether everything that is wanted now was wanted and complete at the last reconcile."""
    progressing = deployment.status.condition(PROGRESSING)
    complete = progressing is not None and progressing.reason == COMPLETE
    # Scaling changes what is wanted without a new generation of the spec.
    wanted = (deployment.identity.generation, deployment.wanted_replicas)
    return complete and (deployment.status.observed_generation, deployment.status.desired_replicas) == wanted


def decisions(made: Iterable[Change]) -> list[Decision]:
    """Decisions about the changes: one for all ordinary ones, one for each unexpected one."""
    made = list(made)
    told = [
        Decision(why.value, f"{verb} {', '.join(str(key(change.manifest)) for change in same)}")
        for why, verb in ((Why.CREATED, "created"), (Why.UPDATED, "updated"))
        if (same := [change for change in made if change.why is why])
    ]
    return [
        *told,
        *(_warning(change) for change in made if change.why in (Why.RECREATED, Why.DRIFT_CORRECTED)),
    ]


def _warning(change: Change) -> Decision:
    name = key(change.manifest)
    if change.why is Why.RECREATED:
        return Decision(change.why.value, f"{name} was deleted by another client; recreated", warning=True)
    return Decision(
        change.why.value,
        f"{name}: {change.place} was changed by another client; drift corrected",
        warning=True,
    )
