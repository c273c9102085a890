"""Converts the load report of a worker for the scaler, and checks it for contradictions."""

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
"""Above it, floats, which rates are computed with, do not represent every integer."""
_BUCKETS_MOST: Final = 64
_LAST_SECOND: Final = 253_402_300_799
"""Of the year 9999, the maximum of a Timestamp."""
_NANOS: Final = 10**9


@dataclass(frozen=True)
class Reading:
    """The result of one round of polling."""

    reports: tuple[Report, ...] = ()
    """Of leaders that responded."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Leaders whose report contradicts itself, with the reason, which completes "its report ..."."""
    silent: frozenset[str] = frozenset()
    """Leaders that did not respond in time."""
    running: int = 0
    """Running and queued requests of the replicas."""
    held: int = 0
    """Requests that frontends hold because there is no replica."""
    loads: tuple[ReplicaLoadStatus, ...] = ()
    """Reported load of the leaders."""


def summary(load: worker_pb2.Load, pod: str) -> ReplicaLoadStatus:
    """The load report of a leader, for the status."""
    capacity = load.kv_tokens_capacity
    # A report of more than 100 % is a contradiction (see `contradiction`) and fits no field of a status.
    used = min(round(100 * load.kv_tokens_used / capacity), 100) if capacity else None
    return ReplicaLoadStatus(pod=pod, queued=load.queued, running=load.running, kv_used_percent=used)


def contradiction(load: worker_pb2.Load) -> str | None:
    """A contradiction within a load report, which completes "its report ..."; None if there is none."""
    ended = load.requests_completed + load.requests_refused + load.requests_expired
    if ended > load.requests_received:
        return f"says that {ended} requests ended although {load.requests_received} arrived"
    if load.queued + load.running > load.requests_received:
        there = load.queued + load.running
        return f"says that {there} requests are active although {load.requests_received} arrived"
    if load.requests_received > _SUM_MOST:
        return f"contains a sum above {_SUM_MOST}"
    if load.kv_tokens_used > load.kv_tokens_capacity:
        return "says that more of the KV cache is used than exists"
    if not 0 <= load.started.seconds <= _LAST_SECOND or not 0 <= load.started.nanos < _NANOS:
        return "contains an invalid start time"
    return _wrong_histogram(load.time_to_first_token_seconds, load.requests_received)


def _wrong_histogram(times: worker_pb2.Histogram, received: int) -> str | None:
    if len(times.bounds) > _BUCKETS_MOST or len(times.counts) > _BUCKETS_MOST:
        return f"contains a histogram of more than {_BUCKETS_MOST} buckets"
    if times.counts and len(times.counts) != len(times.bounds) + 1:
        return "contains a histogram whose counts do not fit its bounds"
    if not all(low < high for low, high in pairwise(times.bounds)) or not all(map(isfinite, times.bounds)):
        return "contains a histogram whose bounds do not ascend"
    if sum(times.counts) > received:
        return "contains a histogram of more requests than arrived"
    return None


def report(load: worker_pb2.Load, replica: str, at: float, started: float, target_s: float) -> Report:
    """The report of one leader.

    Args:
        load: the report, without a `contradiction`.
        replica: name of its pod.
        at: when it was asked.
        started: start of its sums.
        target_s: target time to first token, in seconds.
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
    """Values of a histogram that are certainly above the target: those in buckets that start at it or above.

    bounds: upper ends of the buckets, ascending; counts: one more than bounds.
    """
    return sum(counts[bisect_left(bounds, target_s) + 1 :])
