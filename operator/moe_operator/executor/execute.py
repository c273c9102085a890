"""Executes a plan."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Final, NamedTuple

from moe_api.visible import one_line
from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    OutOfTimeError,
    WebhookUnavailableError,
)
from moe_operator.kube.client import Cluster
from moe_operator.observed.ownership import without_others
from moe_operator.planner.decision import Decision, timestamp
from moe_operator.planner.gates import Gate
from moe_operator.planner.plan import Plan
from moe_operator.render.children import OPTIONAL_KINDS
from moe_operator.render.objects import Key, Manifest, key
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.status import Status

_EVENT_MOST = 1024
"""Maximum characters of an Event's message."""
_MOST_REFUSALS: Final = 3
"""After this many refusals of one kind its other objects wait for the next plan: replicas are all the same.
"""


def execute(
    cluster: Cluster,
    identity: Identity,
    plan: Plan,
    in_time: Callable[[], bool],
    completed: Callable[[Key], None] = lambda _: None,
) -> list[ApplyRefusedError | ApplyForbiddenError]:
    """Executes the plan within the time limit; returns what the API server refused.

    completed: called with each object that was applied or deleted.

    Readiness gates come first, because requests wait for them; then deletions, which free room for the
    objects created after them. No refusal and no conflict stops the rest. A conflict may result from a
    refusal (a RoleBinding conflicts if its Role was refused), so it counts only if there is none.

    Raises other errors of the client, and OutOfTimeError if nothing was refused; completed changes stay, and
    the next plan continues from there.
    """
    effects = list(_effects(cluster, identity, plan))
    refusals: list[ApplyRefusedError | ApplyForbiddenError] = []
    refused: Counter[str] = Counter()
    conflict: ChangedMeanwhileError | None = None
    for done, (kind, effect, about) in enumerate(effects):
        if not in_time():
            if refusals:
                break
            raise OutOfTimeError(
                f"{done} of {len(effects)} changes are applied; the next reconcile continues"
            )
        if refused[kind] >= _MOST_REFUSALS:
            continue
        try:
            effect()
            if about is not None:
                completed(about)
        except (ApplyRefusedError, ApplyForbiddenError) as error:
            # A webhook that does not respond may take the limit of a request each time.
            refused[kind] += _MOST_REFUSALS if isinstance(error, WebhookUnavailableError) else 1
            refusals.append(error)
        except ChangedMeanwhileError as error:
            conflict = conflict or error
    if conflict is not None and not refusals:
        raise conflict
    return refusals


class _Effect(NamedTuple):
    kind: str
    """Of the object; deletions count as another kind."""
    call: Callable[[], None]
    about: Key | None = None
    """The object, if it is applied or deleted."""


def _effects(cluster: Cluster, identity: Identity, plan: Plan) -> Iterator[_Effect]:
    """The effects of a plan, in order."""
    space = identity.namespace
    for gate in plan.gates:
        yield _Effect("Pod", partial(cluster.set_pod_condition, space, gate.pod, gate.uid, _condition(gate)))
    for deletion in plan.delete:
        kind, name = deletion.key
        delete = partial(cluster.delete, kind, space, name, deletion.uid)
        yield _Effect(f"deleted {kind}", delete, deletion.key)
    if plan.secret is not None:
        yield _Effect("Secret", partial(_ensure_secret, cluster, plan.secret))
    for manifest in plan.apply:
        yield _Effect(manifest["kind"], partial(_apply, cluster, manifest), key(manifest))


def _apply(cluster: Cluster, manifest: Manifest) -> None:
    """Applies an object; if it is invalid together with what others added by hand, removes that first."""
    try:
        cluster.apply(manifest)
    except ApplyRefusedError as refusal:
        metadata = manifest["metadata"]
        actual = cluster.read(manifest["kind"], metadata.get("namespace"), metadata["name"])
        alone = manifest if actual is None else without_others(manifest, actual)
        if alone == manifest or manifest["kind"] in OPTIONAL_KINDS:
            raise
        try:
            cluster.merge(alone)
            cluster.apply(manifest)
        except ApplyRefusedError:
            raise refusal from None  # about the object as it should be


def _ensure_secret(cluster: Cluster, make: Callable[[str], Manifest]) -> None:
    """Creates the gangs' Secret with a random value, unless there is one: the operator cannot read it."""
    with contextlib.suppress(ChangedMeanwhileError):
        cluster.create(make(secrets.token_hex(32)))


def _condition(gate: Gate) -> Manifest:
    message = gate.why if gate.open else "its containers are not ready"
    return {
        "type": names.ROUTED,
        "status": "True" if gate.open else "False",
        "reason": "Routed" if gate.open else "NotReady",
        "message": message,
        "lastTransitionTime": timestamp(datetime.now(UTC)),
    }


def write_status(cluster: Cluster, identity: Identity, before: Status, after: Status) -> None:
    """Writes the status if it changed; an unchanged one would only wake all watchers."""
    if not before.without_scaling().same_as(after):
        manifest = {**reference(identity), "status": after.manifest()}
        cluster.apply(manifest, subresource="/status")


def post(cluster: Cluster, identity: Identity, decision: Decision, now: datetime) -> None:
    """Creates an Event for a decision; `kubectl describe` shows it."""
    cluster.create(event(identity, decision, now))


def event(identity: Identity, decision: Decision, now: datetime) -> Manifest:
    """The Event of a decision.

    Its name holds the time, as those of Kubernetes' own components do: they are listed in order even within
    one second, which is as exact as `kubectl describe` gets.
    """
    about = reference(identity)
    metadata = about.pop("metadata")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{identity.name}.{int(now.timestamp() * 1e6) * 1000:x}",
            "namespace": identity.namespace,
        },
        "involvedObject": {**about, **metadata},
        "type": "Warning" if decision.warning else "Normal",
        "reason": decision.reason,
        "message": one_line(decision.message, _EVENT_MOST),
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "reportingInstance": os.environ.get("POD_ID", names.FIELD_MANAGER),
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "eventTime": now.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "action": "Reconcile",
        "count": 1,
    }


def reference(identity: Identity) -> Manifest:
    """The reference to a deployment in a status or an Event."""
    metadata = {"name": identity.name, "namespace": identity.namespace, "uid": identity.uid}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata}
