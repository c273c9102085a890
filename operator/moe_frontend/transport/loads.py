"""Asks replicas for their load, so that frontends see each other's requests. Belongs to one event loop.

A frontend counts its own requests exactly. Of those of other frontends it learns by `GetLoad`, once a second;
a replica that does not answer counts as one without them.
"""

import asyncio
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import grpc
from opentelemetry import metrics

from moe_api.supervision import is_being_cancelled
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_frontend.discovery.endpoints import Endpoint

INTERVAL_S: Final = 1.0
"""Between two rounds; longer where there are more than ROUND_MOST replicas."""
ROUND_MOST: Final = 64
_ANSWER_S: Final = 1.0
_MOST: Final = 2**20
"""No replica has more requests; a report of more is cut."""
_BUCKETS_MOST: Final = 100
_FASTEST_S: Final = 1e-6
_SLOWEST_S: Final = 100.0
"""Of a token; a report beyond is ignored."""
_SMOOTHING: Final = 0.2
"""Weight of the last report with completed requests in the mean time per token."""


@dataclass(frozen=True)
class Reported:
    """The load report of a replica, as far as routing and metrics use it.

    answers, token_s: completed requests, and the sum of their mean times per output token, since it started.
    """

    queued: int
    running: int
    kv_tokens_capacity: int
    kv_tokens_used: int
    answers: int = 0
    token_s: float = 0.0

    @property
    def requests(self) -> int:
        """Of all frontends."""
        return self.queued + self.running


@dataclass(frozen=True)
class Target:
    """A ready replica; `in_flight`: requests of this frontend on it."""

    endpoint: Endpoint
    channel: grpc.aio.Channel
    in_flight: int


class Fleet(Protocol):
    """Whom to ask, and whom to tell."""

    def targets(self) -> list[Target]:
        """The ready replicas."""

    def report_load(self, target: Target, reported: Reported | None) -> None:
        """Notes what a replica reported; None: nothing."""

    @property
    def reported(self) -> list[Reported]:
        """The last reports of the ready replicas."""


class LoadPolling:
    """Asks all replicas, round by round.

    Args:
        fleet: the replicas.
        interval_s: between two rounds, in seconds.
    """

    def __init__(self, fleet: Fleet, interval_s: float = INTERVAL_S) -> None:
        self._fleet = fleet
        self._interval_s = interval_s
        self._unable: set[Endpoint] = set()
        """Replicas without GetLoad."""

    async def run(self) -> None:
        """Asks until it is cancelled."""
        while True:
            targets = [target for target in self._fleet.targets() if target.endpoint not in self._unable]
            self._unable &= {target.endpoint for target in self._fleet.targets()}
            await asyncio.gather(*(self._ask(target) for target in targets))
            await asyncio.sleep(self._interval_s * max(1.0, len(targets) / ROUND_MOST))

    async def _ask(self, target: Target) -> None:
        stub = worker_pb2_grpc.WorkerServiceStub(target.channel)
        try:
            load = await stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                self._unable.add(target.endpoint)
            self._fleet.report_load(target, None)
        except asyncio.CancelledError:
            if is_being_cancelled():
                raise
            self._fleet.report_load(target, None)  # its channel was closed
        else:
            # gRPC gives None for a message that it cannot decode.
            self._fleet.report_load(target, None if load is None else reported(load))

    def measure(self, meter: metrics.Meter) -> None:
        """Creates gauges of all replicas together; they have no value while no replica reports."""
        for name, unit, description, read in (
            ("requests.queued", "{request}", "Requests that wait in the replicas", _queued),
            ("requests.running", "{request}", "Requests in the batches of the replicas", _running),
            ("kv_cache.utilization", "1", "Used share of the KV caches of the replicas", _utilization),
        ):
            observe = functools.partial(self._observe, read)
            meter.create_observable_gauge(f"moe_frontend.replicas.{name}", [observe], unit, description)

    def _observe(
        self, read: Callable[[list[Reported]], float], _: metrics.CallbackOptions
    ) -> Iterable[metrics.Observation]:
        loads = self._fleet.reported
        return [metrics.Observation(read(loads))] if loads else []


def reported(load: worker_pb2.Load) -> Reported:
    """The part of a report that is used, within bounds: a replica is not trusted."""
    capacity, times = load.kv_tokens_capacity, load.time_per_output_token_seconds
    return Reported(
        min(load.queued, _MOST),
        min(load.running, _MOST),
        capacity,
        min(load.kv_tokens_used, capacity),
        sum(times.counts[:_BUCKETS_MOST]),
        times.sum,
    )


def recent_token_s(known: float, before: Reported | None, after: Reported) -> float:
    """The recent mean time per output token, in seconds; 0: not known.

    Args:
        known: the mean before the last report.
        before: the report before the last one.
        after: the last report.
    """
    if before is None or after.answers <= before.answers:
        return known
    mean = (after.token_s - before.token_s) / (after.answers - before.answers)
    if not _FASTEST_S <= mean <= _SLOWEST_S:  # not a number, too: a replica is not trusted
        return known
    return known + _SMOOTHING * (mean - known) if known else mean


def _queued(loads: list[Reported]) -> float:
    return sum(load.queued for load in loads)


def _running(loads: list[Reported]) -> float:
    return sum(load.running for load in loads)


def _utilization(loads: list[Reported]) -> float:
    capacity = sum(load.kv_tokens_capacity for load in loads)
    return sum(load.kv_tokens_used for load in loads) / capacity if capacity else 0.0
