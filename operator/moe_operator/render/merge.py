"""Merges a user's pod template into a rendered one. Pure.

As a strategic merge patch does (kubernetes/community: sig-api-machinery/strategic-merge-patch.md), for the
lists that both sides fill: containers are merged by name; variables, volumes and mounts of the user replace
those of the same key; tolerations are added. Other lists are the user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from moe_operator.render.objects import Manifest

_MERGED: Final = {"containers": "name", "initContainers": "name"}
"""Lists whose items are merged, with the field that identifies an item."""
_REPLACED: Final = {"env": "name", "volumes": "name", "volumeMounts": "mountPath", "ports": "name"}
"""Lists whose items replace one another."""
_ADDED: Final = ("tolerations",)


def merged(rendered: Manifest, users: Manifest) -> Manifest:
    """The rendered object with what the user set; the user's values win."""
    out = dict(rendered)
    for name, value in users.items():
        before = out.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            out[name] = merged(before, value)
        elif isinstance(value, list) and isinstance(before, list):
            out[name] = _lists(name, before, value)
        else:
            out[name] = value
    return out


def _lists(name: str, before: Sequence[Any], users: Sequence[Any]) -> list[Any]:
    if name in _ADDED:
        return [*before, *(item for item in users if item not in before)]
    key = _MERGED.get(name) or _REPLACED.get(name)
    if key is None:
        return list(users)
    items = {item.get(key): item for item in before}
    for item in users:
        known = items.get(item.get(key), {}) if name in _MERGED else {}
        items[item.get(key)] = merged(known, item)
    return list(items.values())
