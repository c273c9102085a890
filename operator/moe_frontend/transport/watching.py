"""Watches what the prefix caches of replicas hold: WatchCache of each. Belongs to one event loop.

A replica whose watch fails counts as not watched until the next snapshot: the index then takes what was sent
to it as held.
"""

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import grpc
from opentelemetry import metrics

from moe_api.supervision import Backoff, Supervisor, is_being_cancelled
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_frontend.discovery.endpoints import Endpoint
from moe_frontend.policy.watched import Held, ImplausibleChangeError, WatchedIndex
from moe_frontend.transport.loads import Target

_LOG: Final = logging.getLogger(__name__)
PACE_S: Final = 0.01
"""Between two messages of a replica, which takes up to 1 ms each: a replica cannot keep a frontend busy."""
_BACKOFF: Final = Backoff(first_s=0.5, longest_s=30.0)
_CHANCE: Final = random.random


class Watchable(Protocol):
    """Whom to watch."""

    def targets(self) -> list[Target]:
        """The ready replicas."""

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after each change of the ready replicas."""


class CacheWatching:
    """Keeps a watch on each ready replica.

    Args:
        fleet: the replicas.
        index: is told what they hold.
        supervisor: runs the watches.
        backoff: between two watches of a replica.
    """

    def __init__(
        self, fleet: Watchable, index: WatchedIndex, supervisor: Supervisor, backoff: Backoff = _BACKOFF
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._supervisor = supervisor
        self._backoff = backoff
        self._watches: dict[tuple[Endpoint, grpc.aio.Channel], asyncio.Task[None]] = {}
        fleet.listen(self._update)
        self._update()

    def _update(self) -> None:
        # A replica gets another channel when this frontend's certificate is renewed.
        targets = {(target.endpoint, target.channel): target for target in self._fleet.targets()}
        for key in self._watches.keys() - targets.keys():
            self._watches.pop(key).cancel()
        for key in targets.keys() - self._watches.keys():
            watch = functools.partial(self._follow, targets[key])
            self._watches[key] = self._supervisor.start("replica-caches", watch, key[0].name)

    async def _follow(self, target: Target) -> None:
        """Watches a replica again and again, unless it does not know the call."""
        failures = 0
        while True:
            held = Held()
            try:
                await self._watch(target, held)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    _LOG.info("%s does not tell what it caches; routing guesses", target.endpoint.name)
                    return
                _LOG.debug("the watch of %s's cache ended: %s", target.endpoint.name, error.details())
            except ImplausibleChangeError as error:
                _LOG.warning("the watch of %s's cache is not used: %s", target.endpoint.name, error)
            except asyncio.CancelledError:
                if is_being_cancelled():
                    raise
                return  # its channel was closed
            finally:
                self._index.forget(target.endpoint.name, held)
            failures = 1 if held.sequence else failures + 1
            await asyncio.sleep(self._backoff.pause_s(failures, _CHANCE()))

    async def _watch(self, target: Target, held: Held) -> None:
        stub = worker_pb2_grpc.WorkerServiceStub(target.channel)
        call = stub.WatchCache(worker_pb2.WatchCacheRequest())
        try:
            async for change in call:
                if change is None:  # gRPC's word for a message that it cannot decode
                    raise ImplausibleChangeError("a message cannot be decoded; asking for a new snapshot")
                self._index.apply(target.endpoint.name, held, change)
                await asyncio.sleep(PACE_S)
        finally:
            call.cancel()

    def measure(self, meter: metrics.Meter) -> None:
        """Creates gauges of all replicas together."""
        for name, unit, description, read in (
            ("replicas", "{replica}", "Replicas that tell what they cache", lambda: self._index.watched),
            ("blocks", "{block}", "Blocks that these replicas hold", lambda: self._index.blocks),
        ):
            observe = functools.partial(_observe, read)
            meter.create_observable_up_down_counter(
                f"moe_frontend.watched_caches.{name}", [observe], unit, description
            )


def _observe(read: Callable[[], int], _: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
    return [metrics.Observation(read())]
