"""Follows the health of every worker there may be: which of them take requests, and at what revision.

A watch of grpc.health.v1 tells at once what Kubernetes knows only after a probe: that a model is loaded, that
a worker drains, that its process is gone. A Pod is Ready only after a frontend routes to it, so its readiness
cannot be what a frontend goes by.
"""

import asyncio
import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_api import transport
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_operator.frontend.endpoints import Endpoint

_LOG: Final = logging.getLogger(__name__)
_ASK_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0
_OPTIONS: Final = (*transport.CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1))


class Prober:
    """Keeps a watch on each endpoint it is told of. For one event loop.

    Args:
        publish: called with the endpoints that take requests, whenever they change.
    """

    def __init__(self, publish: Callable[[frozenset[Endpoint]], None]) -> None:
        self._publish = publish
        self._watches: dict[Endpoint, asyncio.Task[None]] = {}
        self._serving: dict[Endpoint, Endpoint] = {}

    def update(self, endpoints: frozenset[Endpoint]) -> None:
        """Takes over which endpoints there are."""
        for endpoint in [known for known in self._watches if known not in endpoints]:
            self._watches.pop(endpoint).cancel()
            self._set(endpoint, None)
        for endpoint in endpoints - self._watches.keys():
            self._watches[endpoint] = asyncio.create_task(self._follow(endpoint), name=endpoint.name)

    async def close(self) -> None:
        """Ends all watches."""
        watches = list(self._watches.values())
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    async def _follow(self, endpoint: Endpoint) -> None:
        failures = 0
        async with grpc.aio.insecure_channel(endpoint.address, options=_OPTIONS) as channel:
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if await self._watch(channel, endpoint):
                        failures = 0
                self._set(endpoint, None)
                await asyncio.sleep(min(math.ldexp(_FIRST_PAUSE_S, min(failures, 10)), _LONGEST_PAUSE_S))
                failures += 1

    async def _watch(self, channel: grpc.aio.Channel, endpoint: Endpoint) -> bool:
        """Follows one connection to its end; whether it ever took requests."""
        served = False
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for update in watch:
                serving = update.status == health_pb2.HealthCheckResponse.SERVING
                self._set(endpoint, await _with_revision(channel, endpoint) if serving else None)
                served |= serving
        return served

    def _set(self, endpoint: Endpoint, serving: Endpoint | None) -> None:
        before = self._serving.pop(endpoint, None)
        if serving is not None:
            self._serving[endpoint] = serving
        if before != serving:
            _LOG.info("%s %s", endpoint.name, "takes no requests" if serving is None else "takes requests")
            self._publish(frozenset(self._serving.values()))


async def _with_revision(channel: grpc.aio.Channel, endpoint: Endpoint) -> Endpoint:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    model = await stub.GetModel(inference_pb2.GetModelRequest(), timeout=_ASK_S)
    return dataclasses.replace(endpoint, revision=model.revision)
