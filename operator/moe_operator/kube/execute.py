"""Carries out a plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime

from moe_api.visible import one_line
from moe_operator.errors import OutOfTimeError
from moe_operator.kube.client import Cluster
from moe_operator.manifests.decision import Decision, timestamp
from moe_operator.manifests.gates import Gate
from moe_operator.manifests.objects import Manifest
from moe_operator.manifests.plan import Plan
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.status import Status

_EVENT_MOST = 1024
"""Characters of an Event's message that the API server takes."""


def execute(cluster: Cluster, identity: Identity, plan: Plan, in_time: Callable[[], bool]) -> None:
    """Applies and deletes what the plan says, for as long as it is in time.

    Raises what the client raises, and OutOfTimeError; what was done until then stays, and the next plan
    starts from there.
    """
    for done, manifest in enumerate(plan.apply):
        if not in_time():
            raise OutOfTimeError(
                f"{done} of {len(plan.apply)} objects are applied; the others take another turn"
            )
        cluster.apply(manifest)
    for gate in plan.gates:
        cluster.set_pod_condition(identity.namespace, gate.pod, gate.uid, _condition(gate))
    for deletion in plan.delete:
        cluster.delete(deletion.key.kind, identity.namespace, deletion.key.name, deletion.uid)


def _condition(gate: Gate) -> Manifest:
    message = "every frontend sends it requests" if gate.open else "its containers are not ready"
    return {
        "type": names.ROUTED,
        "status": "True" if gate.open else "False",
        "reason": "Routed" if gate.open else "NotReady",
        "message": message,
        "lastTransitionTime": timestamp(datetime.now(UTC)),
    }


def write_status(cluster: Cluster, identity: Identity, before: Status, after: Status) -> None:
    """Writes the status when it changed; one that did not would only wake everybody who watches."""
    if before.without_scaling() != after:
        manifest = {**reference(identity), "status": after.manifest()}
        cluster.apply(manifest, subresource="/status")


def post(cluster: Cluster, identity: Identity, decision: Decision, now: datetime) -> None:
    """Makes an Event of a decision; `kubectl describe` shows it."""
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
    """Which object a part of a status, or an Event, is about."""
    metadata = {"name": identity.name, "namespace": identity.namespace, "uid": identity.uid}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata}
