"""Watches the health of every worker: which of them accept requests, and their revision.

A watch of grpc.health.v1 reports at once what Kubernetes knows only after a probe: a model is loaded, a
worker drains, its process has ended. A Pod becomes Ready only after a frontend routes to it, so a frontend
cannot depend on the readiness of the Pod.
"""

import asyncio
import dataclasses
import functools
import logging
import random
from collections.abc import Callable
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_api import lengths
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.supervision import Backoff, Supervisor
from moe_frontend.discovery.connecting import Connector
from moe_frontend.discovery.endpoints import Endpoint, Served

_LOG: Final = logging.getLogger(__name__)
_ASK_S: Final = 10.0
# Bytes, as inference.proto states it; a template of no more characters is no larger than three times that.
_LARGEST_TEMPLATE: Final = 256 * 2**10
# A worker reports seven at most, of 256 characters each.
_TOKENS_MOST: Final = 64
_TOKEN_MOST: Final = 1024
_BACKOFF: Final = Backoff(first_s=0.1, longest_s=2.0)
_CHANCE: Final = random.random


class Prober:
    """Keeps a watch on each endpoint. Belongs to one event loop.

    Args:
        changed: called after each change of `serving`.
        supervisor: runs the watches.
        connector: opens their channels.
    """

    def __init__(
        self, changed: Callable[[], None], supervisor: Supervisor, connector: Connector | None = None
    ) -> None:
        self._connector = connector or Connector()
        self._changed = changed
        self._supervisor = supervisor
        self._watches: dict[Endpoint, asyncio.Task[None]] = {}
        self._serving: dict[Endpoint, Endpoint] = {}

    @property
    def serving(self) -> frozenset[Endpoint]:
        """The endpoints that accept requests, each with the model that its worker reported."""
        return frozenset(self._serving.values())

    def update(self, endpoints: frozenset[Endpoint]) -> None:
        """Replaces the watched endpoints."""
        for endpoint in [known for known in self._watches if known not in endpoints]:
            self._watches.pop(endpoint).cancel()
            self._set(endpoint, None)
        for endpoint in endpoints - self._watches.keys():
            follow = functools.partial(self._follow, endpoint)
            self._watches[endpoint] = self._supervisor.start("worker-health", follow, endpoint.name)

    async def close(self) -> None:
        """Ends all watches."""
        watches = list(self._watches.values())
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    async def _follow(self, endpoint: Endpoint) -> None:
        failures = 0
        while True:
            # Each with the certificate of its time.
            async with self._connector.channel(endpoint) as channel:
                if await self._watch(channel, endpoint):
                    failures = 0
            failures += 1
            await asyncio.sleep(_BACKOFF.pause_s(failures, _CHANCE()))

    async def _watch(self, channel: grpc.aio.Channel, endpoint: Endpoint) -> bool:
        """Watches one connection until its end; returns whether the worker ever accepted requests."""
        served = False
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        try:
            async for update in watch:
                # gRPC gives None for a message that it cannot decode.
                serving = update is not None and update.status == health_pb2.HealthCheckResponse.SERVING
                self._set(endpoint, await _with_model(channel, endpoint) if serving else None)
                served |= serving
        except grpc.aio.AioRpcError as error:
            _LOG.debug("the watch of %s ended: %s", endpoint.name, error.details())
        finally:
            if self._watches.get(endpoint) is asyncio.current_task():  # else a newer one replaced it
                self._set(endpoint, None)
        return served

    def _set(self, endpoint: Endpoint, serving: Endpoint | None) -> None:
        before = self._serving.pop(endpoint, None)
        if serving is not None:
            self._serving[endpoint] = serving
        if before != serving:
            verb = "accepts no requests" if serving is None else "accepts requests"
            _LOG.info("%s %s", endpoint.name, verb)
            self._changed()


async def _with_model(channel: grpc.aio.Channel, endpoint: Endpoint) -> Endpoint | None:
    """The endpoint with the model that its worker reports; None if that cannot be one."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    model = await stub.GetModel(inference_pb2.GetModelRequest(), timeout=_ASK_S)
    if model is None:  # gRPC's word for a message that it cannot decode
        _LOG.warning("%s is not used: GetModel returns no model; replace it", endpoint.name)
        return None
    if not _plausible(model):
        _LOG.warning("%s is not used: GetModel returns names that are too long; replace it", endpoint.name)
        return None
    return dataclasses.replace(
        endpoint,
        revision=model.revision,
        context_length=model.context_length,
        characters_per_token=model.characters_per_token,
        served=_served(model),
        max_requests=model.max_requests,
    )


def _plausible(model: inference_pb2.Model) -> bool:
    """Whether the names that frontends keep, and repeat in every answer, have a usual length."""
    tokens = model.chat_template.special_tokens
    named = max(map(len, (model.name, model.revision))) <= lengths.MODEL_MOST
    texts = (text for pair in tokens.items() for text in pair)
    return named and len(tokens) <= _TOKENS_MOST and all(len(text) <= _TOKEN_MOST for text in texts)


def _served(model: inference_pb2.Model) -> Served:
    template = model.chat_template
    return Served(
        model.name,
        model.context_length,
        model.sampling_defaults.temperature > 0,
        template.template if len(template.template) <= _LARGEST_TEMPLATE else "",
        tuple(sorted(template.special_tokens.items())),
    )
