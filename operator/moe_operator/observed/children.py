"""Objects that belong to a deployment, or to others under names that it wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from moe_operator.observed import ownership
from moe_operator.observed.ownership import Owned
from moe_operator.render.gang_record import GangRecord, recorded
from moe_operator.render.objects import Key, Manifest, key
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.ports import serves_mutual_tls


@dataclass(frozen=True)
class Owner:
    """The controller of an object."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class Child:
    """One object."""

    key: Key
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    terminating: bool
    controller: Owner | None
    content: Manifest = field(repr=False)
    """The whole object, only to compare it with a rendered one or to copy it."""

    @classmethod
    def read(cls, manifest: Manifest) -> Self:
        """An object as the API server returns it."""
        metadata = manifest["metadata"]
        references = metadata.get("ownerReferences", ())
        controller = next((one for one in references if one.get("controller")), None)
        return cls(
            key(manifest),
            metadata.get("uid", ""),
            metadata.get("labels", {}),
            metadata.get("annotations", {}),
            "deletionTimestamp" in metadata,
            None
            if controller is None
            else Owner(controller.get("kind", ""), controller.get("name", ""), controller["uid"]),
            manifest,
            **cls._more(manifest),
        )

    @classmethod
    def _more(cls, manifest: Manifest) -> dict[str, Any]:  # noqa: ARG003 - of objects that have more fields
        """Fields of its kind."""
        return {}

    @property
    def applied_digest(self) -> str | None:
        """The digest that `objects.sealed` wrote; None if there is none."""
        return self.annotations.get(names.ANNOTATION_DIGEST)

    @cached_property
    def owned_fields(self) -> Owned:
        """Its fields that the operator owns."""
        return ownership.owned(self.content)

    def belongs_to(self, owner: Identity) -> bool:
        """Whether it is a deployment's: controlled by it, or created by the operator for one of its name and
        controlled by nobody, as after `kubectl delete --cascade=orphan` or when somebody took its
        ownerReferences away.
        """
        if self.controller is not None:
            return self.controller.uid == owner.uid
        return self.applied_digest is not None and self._is_named_for(owner.name)

    def is_of_predecessor(self, owner: Identity) -> bool:
        """Whether it belongs to an earlier deployment of the same name: it is about to be deleted."""
        if self.controller is None or self.controller.uid == owner.uid:
            return False
        return (self.controller.kind, self.controller.name) == (names.KIND, owner.name)

    def _is_named_for(self, name: str) -> bool:
        """Whether it has labels as the operator sets them for this deployment, and the name that follows."""
        labels = self.labels
        ours = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_NAME: name}.items() <= labels.items()
        derived = {
            "StatefulSet": f"{name}-{labels.get(names.LABEL_DATA_RANK)}",
            "ControllerRevision": names.revision(name, labels.get(names.LABEL_REVISION, "")),
        }
        shared = (names.workers(name), names.worker_account(name), names.frontend(name))
        kind = self.key.kind
        return ours and self.key.name in ((derived[kind],) if kind in derived else shared)


@dataclass(frozen=True)
class StatefulSet(Child):
    """The StatefulSet of a replica."""

    data_rank: int | None
    """None if it has no such label."""
    revision: str
    """Of its pod template; empty if there is none."""
    size: int
    """Pods of the replica when it is whole."""
    wanted: int
    """Pods that it is to have now."""
    pods: int
    """Pods that its controller has created."""
    observed: bool
    """Its controller has observed it."""
    record: GangRecord
    """What the operator remembers of a gang."""
    secure: bool
    """Its pods serve mutual TLS."""

    @classmethod
    def _more(cls, manifest: Manifest) -> dict[str, Any]:
        spec, status = manifest.get("spec", {}), manifest.get("status", {})
        data_rank = manifest["metadata"].get("labels", {}).get(names.LABEL_DATA_RANK, "")
        of_pods = spec.get("template", {}).get("metadata", {}).get("labels", {})
        return {
            "data_rank": int(data_rank) if data_rank.isdecimal() else None,
            "revision": of_pods.get(names.LABEL_REVISION, ""),
            "size": names.ranks_of(of_pods),
            "wanted": spec.get("replicas", 1),
            "pods": status.get("replicas", 0),
            "observed": bool(status.get("observedGeneration")),
            "record": recorded(manifest),
            "secure": serves_mutual_tls(spec.get("template", {}), names.ROLE_WORKER),
        }


@dataclass(frozen=True)
class FrontendDeployment(Child):
    """The Deployment (apps/v1) of a frontend."""

    current: bool
    """Its controller has observed its latest generation."""
    pods: int
    updated_pods: int
    """Pods of its present template."""
    ready_pods: int
    refusal: str | None
    """Why its controller cannot create pods, as the API server says; None if it can."""

    @classmethod
    def _more(cls, manifest: Manifest) -> dict[str, Any]:
        status = manifest.get("status", {})
        failures = (
            one.get("message", "")
            for one in status.get("conditions", ())
            if one["type"] == "ReplicaFailure" and one["status"] == "True"
        )
        return {
            "current": status.get("observedGeneration", 0) >= manifest["metadata"].get("generation", 0),
            "pods": status.get("replicas", 0),
            "updated_pods": status.get("updatedReplicas", 0),
            "ready_pods": status.get("readyReplicas", 0),
            "refusal": next(failures, None),
        }


@dataclass(frozen=True)
class OptionalChild(Child):
    """An object that exists only while the spec asks for it."""


@dataclass(frozen=True)
class RevisionRecord(Child):
    """A ControllerRevision: the spec of a revision."""

    number: int
    data: Mapping[str, Any]
    former: tuple[str, ...]
    """Numbers that it had before."""

    @classmethod
    def _more(cls, manifest: Manifest) -> dict[str, Any]:
        former = manifest["metadata"].get("annotations", {}).get(names.ANNOTATION_FORMER, "")
        return {
            "number": int(manifest.get("revision", 0)),
            "data": manifest.get("data") or {},
            "former": tuple(number for number in former.split(",") if number),
        }


_CLASSES: Mapping[str, type[Child]] = {
    "StatefulSet": StatefulSet,
    "Deployment": FrontendDeployment,
    "ControllerRevision": RevisionRecord,
    "NetworkPolicy": OptionalChild,
    names.INFERENCE_POOL_KIND: OptionalChild,
    names.HTTP_ROUTE_KIND: OptionalChild,
    names.GRPC_ROUTE_KIND: OptionalChild,
    names.INGRESS_KIND: OptionalChild,
}


def read(manifest: Manifest) -> Child:
    """An object as the API server returns it, in the class of its kind."""
    return _CLASSES.get(manifest["kind"], Child).read(manifest)
