"""Carries out a plan."""

from __future__ import annotations

import os
from datetime import datetime

from moe_operator.kube.client import Cluster
from moe_operator.manifests.conditions import timestamp
from moe_operator.manifests.decision import Decision
from moe_operator.manifests.objects import Manifest
from moe_operator.manifests.plan import Plan
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.status import Status


def execute(cluster: Cluster, identity: Identity, plan: Plan) -> None:
    """Applies and deletes what the plan says.

    Raises what the client raises; what was done until then stays, and the next plan starts from there.
    """
    for manifest in plan.apply:
        cluster.apply(manifest)
    for deletion in plan.delete:
        cluster.delete(deletion.key.kind, identity.namespace, deletion.key.name, deletion.uid)


def write_status(cluster: Cluster, identity: Identity, before: Status, after: Status) -> None:
    """Writes the status when it changed; one that did not would only wake everybody who watches."""
    if before.without_scaling() != after:
        manifest = {**_reference(identity), "status": after.manifest()}
        cluster.apply(manifest, subresource="/status")


def post(cluster: Cluster, identity: Identity, decision: Decision, now: datetime) -> None:
    """Makes an Event of a decision; `kubectl describe` shows it."""
    cluster.create(event(identity, decision, now))


def event(identity: Identity, decision: Decision, now: datetime) -> Manifest:
    """The Event of a decision."""
    reference = _reference(identity)
    metadata = reference.pop("metadata")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{identity.name}.", "namespace": identity.namespace},
        "involvedObject": {**reference, **metadata},
        "type": "Warning" if decision.warning else "Normal",
        "reason": decision.reason,
        # The API server takes 1024 characters.
        "message": decision.message[:1024],
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "reportingInstance": os.environ.get("POD_ID", names.FIELD_MANAGER),
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "count": 1,
    }


def _reference(identity: Identity) -> Manifest:
    metadata = {"name": identity.name, "namespace": identity.namespace, "uid": identity.uid}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata}
