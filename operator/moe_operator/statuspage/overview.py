"""All deployments with the loads of their replicas, as JSON values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from moe_api.worker.v1 import worker_pb2
from moe_operator.statuspage.report import report

Body = Mapping[str, Any]
DECISIONS_MOST = 12
"""Of each deployment, the last ones."""


def overview(
    deployments: Iterable[tuple[Body, Sequence[Body], Sequence[Body]]],
    events: Iterable[Body],
    loads: Mapping[str, worker_pb2.Load],
    now: datetime,
) -> dict[str, Any]:
    """What the page shows.

    Args:
        deployments: each MoEDeployment with its pods and FrontendRoutes, as the API server has them.
        events: Events about deployments.
        loads: of leaders that responded, by address.
        now: when these were read.
    """
    about: dict[str, list[Body]] = {}
    for event in events:
        about.setdefault(event.get("involvedObject", {}).get("uid", ""), []).append(event)
    found = [
        _one(report(body, pods, about.get(body["metadata"]["uid"], []), routes, now), loads)
        for body, pods, routes in deployments
    ]
    return {
        "time": now.isoformat(timespec="seconds"),
        "deployments": sorted(found, key=lambda one: (one["namespace"], one["name"])),
    }


def _one(told: dict[str, Any], loads: Mapping[str, worker_pb2.Load]) -> dict[str, Any]:
    told["decisions"] = told["decisions"][-DECISIONS_MOST:]
    for pod in told["pods"]:
        load = loads.get(pod["address"] or "")
        if load is not None:
            pod["load"] = _load(load)
    return told


def _load(load: worker_pb2.Load) -> dict[str, Any]:
    """Of one replica, with shares in percent; None if the whole is 0."""
    return {
        "queued": load.queued,
        "running": load.running,
        "kvUsedPercent": _percent(load.kv_tokens_used, load.kv_tokens_capacity),
        "prefixHitPercent": _percent(load.prefix_hit_tokens, load.prompt_tokens),
        "outputTokens": load.output_tokens,
    }


def _percent(part: int, whole: int) -> int | None:
    return round(100 * min(part, whole) / whole) if whole else None
