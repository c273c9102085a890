"""A worker's load as the scaler takes it, checked for what contradicts itself."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Final

from moe_api.worker.v1 import worker_pb2
from moe_operator.autoscaling.model.samples import Report
from moe_operator.resources.scaling_status import ReplicaLoadStatus

_SUM_MOST: Final = 2**53
"""Beyond it a float, which rates are computed with, does not hold every whole number."""
_BUCKETS_MOST: Final = 64
_LAST_SECOND: Final = 253_402_300_799
"""Of the year 9999, the last that a Timestamp may hold."""
_NANOS: Final = 10**9


@dataclass(frozen=True)
class Reading:
    """What one round of asking gave."""

    reports: tuple[Report, ...] = ()
    """Of leaders that answered."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Leaders whose answer contradicts itself, each with what is wrong; completes "its report ..."."""
    silent: frozenset[str] = frozenset()
    """Leaders that did not answer in time."""
    running: int = 0
    """Requests that replicas work on or keep in their queues."""
    held: int = 0
    """Requests that frontends hold because there is no replica."""
    loads: tuple[ReplicaLoadStatus, ...] = ()
    """How busy the leaders say they are."""


def summary(load: worker_pb2.Load, pod: str) -> ReplicaLoadStatus:
    """What people are told of a leader's load report."""
    capacity = load.kv_tokens_capacity
    # A worker that reports more than all contradicts itself (`contradiction`), and fits no field of a status.
    used = min(round(100 * load.kv_tokens_used / capacity), 100) if capacity else None
    return ReplicaLoadStatus(pod=pod, queued=load.queued, running=load.running, kv_used_percent=used)


def contradiction(load: worker_pb2.Load) -> str | None:
    """What in a load report cannot be, on its own; completes "its report ..."."""
    ended = load.requests_completed + load.requests_refused + load.requests_expired
    if ended > load.requests_received:
        return f"says that {ended} requests ended though {load.requests_received} came"
    if load.queued + load.running > load.requests_received:
        there = load.queued + load.running
        return f"says that {there} requests are active although {load.requests_received} arrived"
    if load.requests_received > _SUM_MOST:
        return f"holds a sum above {_SUM_MOST}"
    if load.kv_tokens_used > load.kv_tokens_capacity:
        return "says that more of the KV cache is used than there is"
    if not 0 <= load.started.seconds <= _LAST_SECOND or not 0 <= load.started.nanos < _NANOS:
        return "contains an invalid start time"
    return _wrong_histogram(load.time_to_first_token_seconds, load.requests_received)


def _wrong_histogram(times: worker_pb2.Histogram, received: int) -> str | None:
    if len(times.bounds) > _BUCKETS_MOST or len(times.counts) > _BUCKETS_MOST:
        return f"holds a histogram of more than {_BUCKETS_MOST} buckets"
    if times.counts and len(times.counts) != len(times.bounds) + 1:
        return "holds a histogram whose counts do not fit its bounds"
    if not all(low < high for low, high in pairwise(times.bounds)) or not all(map(isfinite, times.bounds)):
        return "holds a histogram whose bounds do not ascend"
    if sum(times.counts) > received:
        return "holds a histogram of more requests than came"
    return None


def report(load: worker_pb2.Load, replica: str, at: float, started: float, target_s: float) -> Report:
    """The report of one leader.

    Args:
        load: what it said; no `contradiction`.
        replica: name of its pod.
        at: when it was asked.
        started: since when its sums count.
        target_s: time to the first token that requests shall keep, in seconds.
    """
    times = load.time_to_first_token_seconds
    return Report(
        replica=replica,
        at=at,
        started=started,
        arrived=float(load.requests_received),
        completed=float(load.requests_completed),
        waiting=float(load.queued),
        late=float(late(times.bounds, times.counts, target_s)),
    )


def late(bounds: Sequence[float], counts: Sequence[int], target_s: float) -> int:
    """Values of a histogram that are surely above the target: those in buckets that begin at it or later.

    bounds: upper ends of the buckets, ascending; counts: one more than bounds.
    """
    return sum(counts[bisect_left(bounds, target_s) + 1 :])
