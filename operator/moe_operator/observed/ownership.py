"""Owners of an object's fields, as server-side apply records them in metadata.managedFields.

A field that another client changes belongs to that client. One that an admission policy changes within our
own apply stays ours, with a value that we did not send.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from moe_operator.render.objects import Manifest
from moe_operator.resources import names

Owned: TypeAlias = Mapping[str, Any] | None
"""A node of FieldsV1 ("f:name" for fields, "k:{...}" for items of lists); {}: all below; None: not known."""
LOST: Final[Mapping[str, Any]] = MappingProxyType({"lost": None})
"""The node of a field that is not the operator's any more, and of all below it."""


def is_ours(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of managedFields lists what the operator applied, the status left aside."""
    ours = (entry.get("manager"), entry.get("operation")) == (names.FIELD_MANAGER, "Apply")
    return ours and not entry.get("subresource")


def owned(manifest: Mapping[str, Any]) -> Owned:
    """The fields of an object that are the operator's."""
    entries = manifest["metadata"].get("managedFields", ())
    return next((entry.get("fieldsV1") or None for entry in entries if is_ours(entry)), None)


def without_others(desired: Manifest, actual: Manifest) -> Manifest:
    """The desired object with null for each field of its spec that only another client sets.

    Server-side apply leaves such fields, and the result may be invalid: only one of minAvailable and
    maxUnavailable may be set. A merge removes what is null. Labels, annotations and whole items of lists are
    left.
    """
    spec = desired.get("spec")
    for entry in actual["metadata"].get("managedFields", ()):
        if not is_ours(entry) and not entry.get("subresource"):
            spec = _cleared(spec, (entry.get("fieldsV1") or {}).get("f:spec") or {})
    return {**desired, "spec": spec} if spec is not None else desired


def _cleared(desired: Any, others: Mapping[str, Any]) -> Any:
    if isinstance(desired, dict):
        fields = {name.removeprefix("f:"): below for name, below in others.items() if name.startswith("f:")}
        fields.pop("metadata", None)
        kept = {name: _cleared(desired[name], below) for name, below in fields.items() if name in desired}
        return {**dict.fromkeys(fields), **desired, **kept}
    if isinstance(desired, list | tuple):
        items = [(key, below) for key, below in others.items() if key.startswith("k:")]
        return [
            next((_cleared(item, below) for key, below in items if _names(key, item)), item)
            for item in desired
        ]
    return desired


def of_field(node: Owned, name: str) -> Owned:
    """Of these, those below a field."""
    return node.get(f"f:{name}", LOST) if node and node is not LOST else node


def of_item(node: Owned, item: Any) -> Owned:
    """Of these, those below an item of a list, which is found by its keys or its value."""
    if not node or node is LOST:
        return node
    found = (below for key, below in node.items() if _names(key, item))
    return next(found, LOST)


def _names(key: str, item: Any) -> bool:
    kind, _, text = key.partition(":")
    if kind == "v":
        return bool(json.loads(text) == item)
    if kind != "k" or not isinstance(item, dict):
        return False
    keys: Mapping[str, Any] = json.loads(text)
    return all(item.get(name, value) == value for name, value in keys.items())
