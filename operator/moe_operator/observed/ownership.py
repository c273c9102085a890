"""Owners of an object's fields, as server-side apply records them in metadata.managedFields.

A field that another client changes belongs to that client. One that an admission policy changes within our
own apply stays ours, with a value that we did not send.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

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
