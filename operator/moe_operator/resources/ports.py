"""Ports that pods declare; the name of a port tells what is spoken there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from moe_operator.resources import names

_SECURE_NAMES: Final = (names.SECURE_GRPC_PORT_NAME, names.SECURE_ADMIN_PORT_NAME)
_ADMIN_NAMES: Final = (names.ADMIN_PORT_NAME, names.SECURE_ADMIN_PORT_NAME)
PORT_NAMES: Final = frozenset((*_SECURE_NAMES, *_ADMIN_NAMES))
"""Names of the ports that are looked for here."""


def serves_mutual_tls(manifest: Mapping[str, Any], role: str) -> bool:
    """Whether a pod, or those of a pod template, serve mutual TLS in their container of this role."""
    return bool(_port(manifest, role, _SECURE_NAMES))


def admin_port(manifest: Mapping[str, Any]) -> int:
    """Where a frontend's pod responds to the operator."""
    return _port(manifest, names.ROLE_FRONTEND, _ADMIN_NAMES) or names.GRPC_PORT


def _port(manifest: Mapping[str, Any], role: str, accepted: Collection[str]) -> int:
    """The port of one of these names that the container of this name declares; 0 if there is none."""
    declared = (
        port
        for container in manifest.get("spec", {}).get("containers", ())
        if container["name"] == role
        for port in container.get("ports", ())
    )
    return next((int(port["containerPort"]) for port in declared if port.get("name") in accepted), 0)
