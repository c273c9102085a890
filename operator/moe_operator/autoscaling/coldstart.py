"""Measures the cold start of a replica from the status of its leader pod."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class ColdStart:
    """The phases of one cold start, in seconds of the wall clock. Kubernetes stores times to the second."""

    uid: str
    """Of the pod."""
    pod: str
    """Its name."""
    made: str
    """When it was created (RFC 3339)."""
    scheduling: float
    """From its creation until it had a node."""
    image: float
    """From there until the container ran: pulling the image, mounting volumes."""
    loading: float
    """From there until it was ready: loading the model, warm-up."""

    @property
    def total(self) -> float:
        """From the creation of the pod until it was ready."""
        return self.scheduling + self.image + self.loading


def measure(pod: Mapping[str, Any]) -> ColdStart | None:
    """The cold start of a pod that is Ready for the first time; None if it cannot be measured.

    A pod with a restarted container is ignored: the restart was not a cold start.
    """
    metadata, status = pod["metadata"], pod.get("status", {})
    conditions = {item["type"]: item for item in status.get("conditions", ())}
    containers = status.get("containerStatuses", ())
    if not containers or any(container.get("restartCount", 0) for container in containers):
        return None
    made, scheduled = metadata.get("creationTimestamp"), _since(conditions, "PodScheduled")
    ran = max((_started(container) for container in containers), default="")
    ready = _since(conditions, "Ready")
    if not (made and scheduled and ran and ready):
        return None
    times = [datetime.fromisoformat(text) for text in (made, scheduled, ran, ready)]
    phases = [(after - before).total_seconds() for before, after in pairwise(times)]
    if min(phases) < 0:
        return None
    return ColdStart(metadata["uid"], metadata["name"], made, *phases)


def _since(conditions: Mapping[str, Mapping[str, str]], kind: str) -> str:
    condition = conditions.get(kind, {})
    return condition.get("lastTransitionTime", "") if condition.get("status") == "True" else ""


def _started(container: Mapping[str, Any]) -> str:
    started: str = container.get("state", {}).get("running", {}).get("startedAt", "")
    return started
