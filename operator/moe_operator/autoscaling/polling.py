"""Asks replicas how busy they are, and frontends who waits; a silent one holds up nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

import grpc

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_api.supervision import is_being_cancelled
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_operator.autoscaling import readings
from moe_operator.autoscaling.model.samples import Report
from moe_operator.autoscaling.readings import Reading
from moe_operator.autoscaling.subject import Subject
from moe_operator.planner.observed import Pod
from moe_operator.rpc.leader import CHANNEL_OPTIONS, target

Answer = TypeVar("Answer")


class Poller:
    """Connections to leaders and frontends, by address. For one event loop.

    Args:
        timeout_s: limit of one call, in seconds.
        speed: seconds of the scaling clock in one of the wall's.
        clock: seconds since the epoch.
    """

    def __init__(self, timeout_s: float, speed: float, clock: Callable[[], float] = time.time) -> None:
        self._timeout_s = timeout_s
        self._speed = speed
        self._clock = clock
        self._channels: dict[str, grpc.aio.Channel] = {}

    def now(self) -> float:
        """Seconds of the scaling clock."""
        return self._clock() * self._speed

    async def read(self, subject: Subject) -> Reading:
        """Asks all replicas of a deployment, and its frontends where requests may be held."""
        asked = [pod for pod in subject.leaders if pod.address]
        held, loads = await asyncio.gather(
            self.held(subject), asyncio.gather(*(self._load(pod) for pod in asked))
        )
        answers = dict(zip(asked, loads, strict=True))
        silent = frozenset(pod.name for pod, load in answers.items() if load is None and pod.ready)
        given = {pod: load for pod, load in answers.items() if load is not None}
        wrong = {pod.name: why for pod, load in given.items() if (why := readings.contradiction(load))}
        sound = {pod: load for pod, load in given.items() if pod.name not in wrong}
        target_s = subject.scaling.latency_target_s
        return Reading(
            reports=tuple(self._report(pod, load, target_s) for pod, load in sound.items()),
            wrong=wrong,
            silent=silent,
            running=sum(load.running + load.queued for load in sound.values()),
            held=held,
            loads=tuple(readings.summary(load, pod.name) for pod, load in sound.items()),
        )

    async def held(self, subject: Subject) -> int:
        """Requests that all frontends together hold; one that does not answer holds none."""
        if not subject.deployment.scales_to_zero:
            return 0
        return sum(await asyncio.gather(*(self._demand(address, 0.0) for address in subject.frontends)))

    async def first_held(self, subject: Subject, wait_s: float) -> bool:
        """Waits up to `wait_s` seconds until a frontend holds a request; whether one does."""
        asking = {asyncio.create_task(self._demand(address, wait_s)) for address in subject.frontends}
        try:
            for answer in asyncio.as_completed(asking):
                if await answer:
                    return True
            return False
        finally:
            for task in asking:
                task.cancel()

    async def release(self, addresses: Collection[str]) -> None:
        """Closes the connections to addresses that are not asked any more."""
        channels = [self._channels.pop(address) for address in addresses if address in self._channels]
        await asyncio.gather(*(channel.close() for channel in channels))

    async def close(self) -> None:
        """Closes all connections."""
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close() for channel in channels.values()))

    async def _load(self, pod: Pod) -> worker_pb2.Load | None:
        stub = worker_pb2_grpc.WorkerServiceStub(self._channel(pod.address))
        return await _answer(stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=self._timeout_s))

    async def _demand(self, address: str, wait_s: float) -> int:
        stub = frontend_pb2_grpc.FrontendServiceStub(self._channel(address))
        request = frontend_pb2.GetDemandRequest()
        request.wait.FromNanoseconds(round(wait_s * 1e9))
        demand = await _answer(stub.GetDemand(request, timeout=wait_s + self._timeout_s))
        return 0 if demand is None else demand.held

    def _report(self, pod: Pod, load: worker_pb2.Load, target_s: float) -> Report:
        started = load.started.ToNanoseconds() / 1e9 * self._speed
        return readings.report(load, pod.name, self.now(), started, target_s)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(target(address), CHANNEL_OPTIONS)
        return self._channels[address]


async def _answer(call: Awaitable[Answer]) -> Answer | None:
    """What a call answers; None where it fails, or somebody closes its channel meanwhile.

    gRPC raises CancelledError in calls whose channel is closed, as if the caller were cancelled.
    """
    try:
        return await call
    except grpc.aio.AioRpcError:
        return None
    except asyncio.CancelledError:
        if is_being_cancelled():
            raise
        return None
