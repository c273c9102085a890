"""Reads the load of replicas, and the requests that frontends hold; one that hangs delays no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from moe_api.clock import ForwardClock
from moe_api.worker.v1 import worker_pb2
from moe_operator.autoscaling import readings
from moe_operator.autoscaling.model.samples import Report
from moe_operator.autoscaling.readings import Reading
from moe_operator.autoscaling.subject import Subject
from moe_operator.observed.pods import Pod
from moe_operator.rpc.pods import PodClient


class Poller:
    """Reads what scaling needs from the pods of a deployment.

    Args:
        client: of leaders and frontends.
        speed: seconds of the scaling clock per second of the wall clock.
        clock: seconds since the epoch, never going back: reports in the wrong order are ignored.
    """

    def __init__(self, client: PodClient, speed: float, clock: Callable[[], float] | None = None) -> None:
        self._client = client
        self._speed = speed
        self._clock = clock or ForwardClock()

    def now(self) -> float:
        """Seconds of the scaling clock."""
        return self._clock() * self._speed

    async def read(self, subject: Subject) -> Reading:
        """Asks all replicas of a deployment, and its frontends if they may hold requests."""
        asked = [pod for pod in subject.leaders if pod.address]
        held, loads = await asyncio.gather(
            self.held(subject), asyncio.gather(*(self._client.load(pod.grpc_address) for pod in asked))
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
        """Requests that all frontends together hold."""
        if not subject.deployment.scales_to_zero:
            return 0
        return sum(await asyncio.gather(*(self._client.held(address, 0.0) for address in subject.frontends)))

    async def first_held(self, subject: Subject, wait_s: float) -> bool:
        """Waits up to `wait_s` seconds until a frontend holds a request; returns whether one does."""
        asking = {asyncio.create_task(self._client.held(address, wait_s)) for address in subject.frontends}
        try:
            for answer in asyncio.as_completed(asking):
                if await answer:
                    return True
            return False
        finally:
            for task in asking:
                task.cancel()

    def _report(self, pod: Pod, load: worker_pb2.Load, target_s: float) -> Report:
        started = load.started.ToNanoseconds() / 1e9 * self._speed
        return readings.report(load, pod.name, self.now(), started, target_s)
