"""A MoEDeployment as it is read from the API server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import ValidationError

from moe_operator.errors import InvalidSpecError
from moe_operator.resources import names
from moe_operator.resources.digest import canonical, digest
from moe_operator.resources.scaling_spec import Mode
from moe_operator.resources.spec import Spec
from moe_operator.resources.status import Status
from moe_operator.resources.transport_spec import Transport

_RESTARTED_MOST = 64
"""Characters of the time of a restart that count: a time has 32 at the most."""


class Name(NamedTuple):
    """Which deployment."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Identity:
    """Which object it is."""

    namespace: str
    name: str
    uid: str
    generation: int
    """Counts the changes of the spec."""


@dataclass(frozen=True)
class Pin:
    """A rendered pod template and the spec from which it was rendered, both as JSON values."""

    spec: Mapping[str, Any]
    template: Mapping[str, Any]

    @cached_property
    def text(self) -> str:
        """As the annotation stores it."""
        return canonical({"spec": self.spec, "template": self.template})

    @cached_property
    def revision(self) -> str:
        """Hash of the pod spec, of the last restart, and of labels and annotations that the user set."""
        added = [text for text in (self.restarted_at, self._users_metadata) if text]
        spec = self.template["spec"]
        return digest([spec, *added] if added else spec)

    @property
    def _users_metadata(self) -> Any:
        """Labels and annotations of spec.worker.podTemplate, or nothing."""
        return (self.spec.get("worker", {}).get("podTemplate") or {}).get("metadata")

    @property
    def foreign_labels(self) -> dict[str, str]:
        """Labels of the pods that the operator did not set (spec.worker.podTemplate)."""
        return dict((self._users_metadata or {}).get("labels", {}))

    @property
    def restarted_at(self) -> str:
        """The last restart of the pods; empty where there was none."""
        return str(self.template["metadata"].get("annotations", {}).get(names.ANNOTATION_RESTARTED, ""))


@dataclass(frozen=True)
class Deployment:
    """One MoEDeployment."""

    identity: Identity
    spec: Spec
    status: Status
    restarted_at: str = ""
    """Time of the last requested restart; empty if there was none. Another text is another restart."""
    pinned: Mapping[str, Pin] = field(default_factory=dict)
    """Pod templates by role: those that were rendered before and are still valid, or new ones."""
    operator_namespace: str = ""
    """Where the operator runs; empty if it does not know."""
    has_secure_workers: bool = False
    """A worker serves mutual TLS or is about to, whatever the spec asks for by now."""

    @property
    def name(self) -> str:
        """metadata.name."""
        return self.identity.name

    @property
    def for_frontends(self) -> Deployment:
        """The deployment as frontends are rendered: they keep certificates until no worker asks for one."""
        if self.spec.transport.mutual or not self.has_secure_workers:
            return self
        spec = self.spec.model_copy(update={"transport": Transport(mode="MutualTLS")})
        return replace(self, spec=spec)

    @property
    def served_name(self) -> str:
        """The name that requests ask for."""
        return self.spec.model.served_name or self.name

    @property
    def scales_to_zero(self) -> bool:
        """Whether scaling may delete the last replica, and a request creates one again."""
        return self.spec.scaling is not None and self.spec.scaling.scales_to_zero

    @property
    def wanted_replicas(self) -> int:
        """Desired number of replicas.

        In mode Auto it is the scaler's last decision, or the number before the first one, within the current
        bounds. Otherwise it is spec.replicas, which a user, another autoscaler or mode Auto has written.
        """
        scaling, decided = self.spec.scaling, self.status.scaling
        if scaling is None or scaling.mode is not Mode.AUTO:
            return self.spec.replicas
        before = decided.desired_replicas if decided else self.status.desired_replicas
        return scaling.bounded(self.spec.replicas if before is None else before)

    @property
    def replicas_to_record(self) -> int | None:
        """The number to write into spec.replicas; None if the field has it already, or others set the field.

        It follows the decisions of scaling, and before the first one the existing number, so that replicas
        stay as they are when scaling is turned off.
        """
        scaling, decided = self.spec.scaling, self.status.scaling
        if scaling is None or scaling.mode is not Mode.AUTO:
            return None
        stated = decided.desired_replicas if decided else self.status.desired_replicas
        wanted = self.wanted_replicas
        return wanted if wanted == stated != self.spec.replicas else None


def identity(body: Mapping[str, Any]) -> Identity:
    """The identity of an object as the API server returns it."""
    metadata = body["metadata"]
    return Identity(metadata["namespace"], metadata["name"], metadata["uid"], metadata.get("generation", 0))


def parse(body: Mapping[str, Any]) -> Deployment:
    """Reads an object as the API server returns it.

    Raises InvalidSpecError, which names every field that is wrong.
    """
    try:
        spec = Spec.model_validate(body.get("spec") or {})
    except ValidationError as error:
        raise InvalidSpecError(sentence(error)) from error
    return Deployment(identity(body), spec, parse_status(body), restarted_at(body))


def restarted_at(body: Mapping[str, Any]) -> str:
    """The annotation by which users request a restart, bounded; empty if there is none."""
    annotations = body["metadata"].get("annotations") or {}
    return str(annotations.get(names.ANNOTATION_RESTARTED, ""))[:_RESTARTED_MOST]


def parse_status(body: Mapping[str, Any]) -> Status:
    """The object's status; an empty one if there is none, or it is not valid any more."""
    try:
        return Status.model_validate(body.get("status") or {})
    except ValidationError:
        return Status()


def sentence(error: ValidationError) -> str:
    """Every violation as "spec.field: what is wrong", joined by semicolons."""
    parts = []
    for problem in error.errors():
        path = ".".join(str(part) for part in ("spec", *problem["loc"]))
        parts.append(f"{path}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)
