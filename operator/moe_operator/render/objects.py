"""Common parts of all rendered objects."""

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
    """UID of the object's controller; None if it has none."""
    references = manifest["metadata"].get("ownerReferences", ())
    return next((reference["uid"] for reference in references if reference.get("controller")), None)


def applied_digest(manifest: Mapping[str, Any]) -> str | None:
    """The digest that `sealed` wrote, or None when there is none."""
    digest_text: str | None = manifest["metadata"].get("annotations", {}).get(names.ANNOTATION_DIGEST)
    return digest_text


def sealed(manifest: Manifest) -> Manifest:
    """The object with an annotation that holds the digest of the rest."""
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), names.ANNOTATION_DIGEST: digest(manifest, length=16)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}
