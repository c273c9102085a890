"""Asks workers for their load and frontends for the requests that they hold. Keeps the connections."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection
from typing import TypeVar

import grpc

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_api.supervision import is_being_cancelled
from moe_api.tls import KeyPair
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_operator.rpc.dialing import PLAINTEXT, Dialer
from moe_operator.rpc.leader import CHANNEL_OPTIONS

Answer = TypeVar("Answer")


class PodClient:
    """Connections to workers and frontends, by address. For one event loop.

    timeout_s: limit of one call, in seconds. dialer: opens them.
    """

    def __init__(self, timeout_s: float, dialer: Dialer = PLAINTEXT) -> None:
        self._timeout_s = timeout_s
        self._dialer = dialer
        self._channels: dict[str, tuple[KeyPair | None, grpc.aio.Channel]] = {}

    async def load(self, address: str) -> worker_pb2.Load | None:
        """The load of a worker; None if it does not respond in time."""
        return await self._load(await self._channel(address))

    async def active(self, addresses: Collection[str]) -> dict[str, int]:
        """Queued and running requests by address, without workers that do not respond in time.

        A reconcile asks only once, so these connections are not kept.
        """
        loads = await self.loads(addresses)
        return {address: load.queued + load.running for address, load in loads.items()}

    async def loads(self, addresses: Collection[str]) -> dict[str, worker_pb2.Load]:
        """The loads of workers by address, as `active`."""
        loads = await asyncio.gather(*map(self._load_once, addresses))
        found = zip(addresses, loads, strict=True)
        return {address: load for address, load in found if load is not None}

    async def held(self, address: str, wait_s: float) -> int:
        """Requests that a frontend holds; 0 if it does not respond.

        wait_s: how long the frontend waits for a first request, in seconds.
        """
        stub = frontend_pb2_grpc.FrontendServiceStub(await self._channel(address))
        request = frontend_pb2.GetDemandRequest()
        request.wait.FromNanoseconds(round(wait_s * 1e9))
        demand = await _answer(stub.GetDemand(request, timeout=wait_s + self._timeout_s))
        return 0 if demand is None else demand.held

    async def release(self, addresses: Collection[str]) -> None:
        """Closes the connections to pods that are not asked any more."""
        kept = [self._channels.pop(address) for address in addresses if address in self._channels]
        await asyncio.gather(*(channel.close() for _, channel in kept))

    async def close(self) -> None:
        """Closes all connections."""
        await self.release(tuple(self._channels))

    async def _load_once(self, address: str) -> worker_pb2.Load | None:
        async with self._dialer.aio_channel(address, CHANNEL_OPTIONS) as channel:
            return await self._load(channel)

    async def _load(self, channel: grpc.aio.Channel) -> worker_pb2.Load | None:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        return await _answer(stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=self._timeout_s))

    async def _channel(self, address: str) -> grpc.aio.Channel:
        """The kept connection, or a new one: also when the operator's certificate was renewed."""
        pair = self._dialer.current(address)
        known = self._channels.get(address)
        if known is not None and known[0] is pair:
            return known[1]
        opened = self._dialer.aio_channel(address, CHANNEL_OPTIONS)
        self._channels[address] = (pair, opened)
        if known is not None:
            await known[1].close()
        return opened


async def _answer(call: Awaitable[Answer]) -> Answer | None:
    """The response; None if the call fails, or its channel is closed meanwhile.

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
