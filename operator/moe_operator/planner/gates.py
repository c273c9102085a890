"""Decides when a leader's readiness gate opens: when every frontend routes to it.

A pod is Ready when its containers are ready and its gates are open. Without the gate a worker would be Ready
when it has loaded its model, a moment before the frontends know it; with the gate, a Ready worker can receive
requests. The gate closes when the containers are not ready, so a restarted worker is routed again first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_operator.observed.pods import Pod


@dataclass(frozen=True)
class Gate:
    """The desired state of a gate."""

    pod: str
    uid: str
    open: bool
    why: str = "every frontend sends it requests"
    """Why it is open."""


def waiting(leaders: Iterable[Pod]) -> list[Pod]:
    """Leaders whose containers are ready and whose gate is closed."""
    return [pod for pod in leaders if pod.gated and not pod.routed and pod.containers_ready]


def of_followers(workers: Iterable[Pod]) -> list[Gate]:
    """The gates of workers that do not lead: open while their containers are ready, for requests go to the
    leader.
    """
    return [
        Gate(pod.name, pod.uid, pod.containers_ready, "its leader takes requests for it")
        for pod in workers
        if pod.rank and pod.gated and not pod.terminating and pod.routed != pod.containers_ready
    ]


def changes(leaders: Iterable[Pod], routed: Mapping[str, str]) -> list[Gate]:
    """The gates to set.

    routed: addresses, by pod name, of the leaders to which every frontend routes; empty if nobody was asked.
    """
    leaders = list(leaders)
    opening = [pod for pod in waiting(leaders) if routed.get(pod.name) in pod.addresses]
    closing = [pod for pod in leaders if pod.routed and not pod.containers_ready and not pod.terminating]
    return [Gate(pod.name, pod.uid, pod in opening) for pod in (*opening, *closing)]
