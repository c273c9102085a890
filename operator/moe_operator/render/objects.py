"""What all rendered objects have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.digest import digest

Manifest = dict[str, Any]


class Key(NamedTuple):
    """Identifies a child of a deployment within its namespace."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def key(manifest: Mapping[str, Any]) -> Key:
    """The key of an object."""
    return Key(manifest["kind"], manifest["metadata"]["name"])


def child(
    owner: Identity,
    api_version: str,
    kind: str,
    name: str,
    role: str,
    labels: Mapping[str, str] | None = None,
) -> Manifest:
    """An object without content that belongs to a deployment: deleted with it, found by its labels."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner.namespace,
            "labels": {
                **names.recommended_labels(owner.name, role),
                names.LABEL_NAME: owner.name,
                names.LABEL_ROLE: role,
                **(labels or {}),
            },
            "ownerReferences": [_owner_reference(owner)],
        },
    }


def _owner_reference(owner: Identity) -> Manifest:
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def owner_uid(manifest: Mapping[str, Any]) -> str | None:
    """UID of the object's controller, or None when nothing controls it."""
    references = manifest["metadata"].get("ownerReferences", ())
    return next((reference["uid"] for reference in references if reference.get("controller")), None)


def belongs(manifest: Mapping[str, Any], owner: Identity) -> bool:
    """Whether an object is a deployment's: controlled by it, or made by us for one of its name and controlled
    by nobody, as after `kubectl delete --cascade=orphan` or when somebody took its ownerReferences away.
    """
    controller = owner_uid(manifest)
    if controller is not None:
        return controller == owner.uid
    return applied_digest(manifest) is not None and _is_named_for(manifest, owner.name)


def of_predecessor(manifest: Mapping[str, Any], owner: Identity) -> bool:
    """Whether an object belongs to an earlier deployment of the same name: it is about to be deleted."""
    references = manifest["metadata"].get("ownerReferences", ())
    theirs = (one for one in references if one.get("controller") and one["uid"] != owner.uid)
    return any((one.get("kind"), one.get("name")) == (names.KIND, owner.name) for one in theirs)


def _is_named_for(manifest: Mapping[str, Any], name: str) -> bool:
    """Whether an object has labels as we set them for this deployment, and the name that follows."""
    metadata = manifest["metadata"]
    labels = metadata.get("labels", {})
    ours = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_NAME: name}.items() <= labels.items()
    derived = {
        "StatefulSet": f"{name}-{labels.get(names.LABEL_DATA_RANK)}",
        "ControllerRevision": names.revision(name, labels.get(names.LABEL_REVISION, "")),
    }
    shared = (names.workers(name), names.worker_account(name), names.frontend(name))
    kind = manifest["kind"]
    return ours and metadata["name"] in ((derived[kind],) if kind in derived else shared)


def applied_digest(manifest: Mapping[str, Any]) -> str | None:
    """The digest that `sealed` wrote, or None when there is none."""
    digest_text: str | None = manifest["metadata"].get("annotations", {}).get(names.ANNOTATION_DIGEST)
    return digest_text


def sealed(manifest: Manifest) -> Manifest:
    """The object with an annotation that holds the digest of the rest."""
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), names.ANNOTATION_DIGEST: digest(manifest, length=16)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}
