"""To which leaders a frontend routes, as it publishes it in a FrontendRoutes object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from moe_operator.resources import names

Routes: TypeAlias = frozenset[tuple[str, str]]
"""Pod names and IP addresses of leaders."""


def published(manifests: Iterable[Mapping[str, Any]]) -> dict[str, Routes]:
    """The published routes of frontends, by the UID of the frontend's pod."""
    return {
        owner["uid"]: frozenset((to["name"], host(to["address"])) for to in manifest.get("routes", ()))
        for manifest in manifests
        for owner in manifest["metadata"].get("ownerReferences", ())
        if owner["kind"] == "Pod" and owner["name"] == manifest["metadata"]["name"]
    }


def host(address: str) -> str:
    """The IP address in HOST:PORT."""
    return address.removesuffix(f":{names.GRPC_PORT}").strip("[]")
