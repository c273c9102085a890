"""Decides when a leader's readiness gate opens: once every frontend sends it requests.

The kubelet calls a pod Ready when its containers are and its gates are open. Without the gate a worker would
be Ready when it has loaded its model, which frontends learn a moment later; with it, whoever sees Ready can
send a request. The gate closes where the containers are not ready: a worker that starts again is routed anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_operator.planner.observed import Observed, Pod
from moe_operator.resources import names

Routes = frozenset[tuple[str, str]]
"""Pod names and IP addresses of leaders."""


@dataclass(frozen=True)
class Gate:
    """A gate as it shall be."""

    pod: str
    uid: str
    open: bool


def waiting(leaders: Iterable[Pod]) -> list[Pod]:
    """Leaders whose containers are ready and whose gate is closed."""
    return [pod for pod in leaders if pod.gated and not pod.routed and pod.containers_ready]


def published(observed: Observed) -> dict[str, Routes]:
    """What frontends wrote of their routes, by the UID of the frontend's pod."""
    return {
        owner["uid"]: frozenset((to["name"], host(to["address"])) for to in manifest.get("routes", ()))
        for manifest in observed.routes
        for owner in manifest["metadata"].get("ownerReferences", ())
        if owner["kind"] == "Pod" and owner["name"] == manifest["metadata"]["name"]
    }


def host(address: str) -> str:
    """The IP address in HOST:PORT."""
    return address.removesuffix(f":{names.GRPC_PORT}").strip("[]")


def changes(leaders: Iterable[Pod], routed: Mapping[str, str]) -> list[Gate]:
    """The gates to set.

    routed: addresses, by pod name, of the leaders to which every frontend sends requests; empty where nobody
    was asked.
    """
    leaders = list(leaders)
    opening = [pod for pod in waiting(leaders) if routed.get(pod.name) == pod.address]
    closing = [pod for pod in leaders if pod.routed and not pod.containers_ready and not pod.terminating]
    return [Gate(pod.name, pod.uid, pod in opening) for pod in (*opening, *closing)]
