"""Measures the cold start of a replica from the status of its leader pod."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from moe_operator.observed.pods import Pod
from moe_operator.planner.decision import timestamp

LOADING_MOST_S: Final = 3700.0
"""The startup probe restarts a worker that has not loaded after an hour. A longer time is no cold start: the
pod was not ready for a moment, and Kubernetes stores only the last change of a condition.
"""


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


def measure(pod: Pod) -> ColdStart | None:
    """The cold start of a pod that is Ready for the first time; None if it cannot be measured.

    A pod with a restarted container is ignored: the restart was not a cold start.
    """
    started = [container.started for container in pod.status.containers]
    if not started or pod.restarts:
        return None
    ran = [time for time in started if time is not None]
    times = (
        pod.created,
        pod.status.since("PodScheduled", "True"),
        max(ran, default=None),
        pod.status.since("Ready", "True"),
    )
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return None
    phases = [(after - before).total_seconds() for before, after in pairwise(known)]
    if min(phases) < 0 or phases[-1] > LOADING_MOST_S:
        return None
    return ColdStart(pod.uid, pod.name, timestamp(known[0]), *phases)
