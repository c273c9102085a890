"""Merges a user's pod template into a rendered one. Pure.

As a strategic merge patch does (kubernetes/community: sig-api-machinery/strategic-merge-patch.md), for the
lists that both sides fill: containers are merged by name, and ports by number and protocol; variables,
volumes and mounts of the user replace those of the same key; tolerations are added. Other lists are the
user's. Rendered ports keep their names, by which Services, frontends and the operator find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from moe_operator.render.objects import Manifest

_KEYS: Final = {
    "containers": ("name",),
    "initContainers": ("name",),
    "ports": ("containerPort", "protocol"),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
}
"""Lists that both sides fill, with the fields that identify an item."""
_MERGED: Final = ("containers", "initContainers", "ports")
"""Those whose items are merged; items of the others replace one another."""
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
    keys = _KEYS.get(name)
    if keys is None:
        return list(users)
    items = {_identity(item, keys): item for item in before}
    for item in users:
        key = _identity(item, keys)
        known = items.get(key, {}) if name in _MERGED else {}
        items[key] = merged(known, item)
        if name == "ports" and "name" in known:
            items[key]["name"] = known["name"]
    return list(items.values())


def _identity(item: Manifest, keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(item.get(key) for key in keys)
