"""Where requests of tenants wait while the replicas have no slot for them; they are served in fair order.

The number of slots is what the replicas say that they accept. One tenant cannot take them all (`Slots`), so
that a tenant with few requests finds one at once, whatever others have sent. Requests without a tenant do not
wait here: a full replica refuses them.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

import grpc
from google.rpc import status_pb2

from moe_api import rich_status
from moe_api.slots import Slots
from moe_frontend.policy.fair import FairQueue

WAITING_MOST: Final = 1000
"""Requests that wait, of all tenants."""
_SPARE: Final = 6
"""Below the worker's: a worker frees a slot a moment after its frontend knows of it."""
_RETRY_S: Final = 1.0


@dataclass(eq=False)
class _Waiting:
    """A request that waits. result: None: it has a slot; else why it gets none."""

    number: int
    result: "asyncio.Future[status_pb2.Status | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Turns:
    """The requests of tenants that are at replicas, and those that wait. Belongs to one event loop.

    Args:
        most: requests that all replicas together accept; 0: not known.
        patience_s: how long a request waits.
    """

    def __init__(self, most: Callable[[], int], patience_s: float) -> None:
        self._most = most
        self._patience_s = patience_s
        self._slots = Slots(_SPARE)
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def slot(self, tenant: str, weight: int, cost: int) -> AsyncIterator[status_pb2.Status | None]:
        """A slot for a request during the block; yields why it gets none, or None.

        cost: of the request, in tokens.
        """
        if not tenant:
            yield None
            return
        number = next(self._numbers)
        try:
            yield await self._wait(number, tenant, weight, cost)
        finally:
            self._slots.free(number)
            self.changed()

    def changed(self) -> None:
        """Gives free slots to those that wait; to be called when the replicas are others."""
        while taken := self._queue.pop(self._has_room):
            tenant, waiting = taken
            if not waiting.result.done():
                self._slots.take(waiting.number, tenant)
                waiting.result.set_result(None)

    def _has_room(self, tenant: str) -> bool:
        most = self._most()
        return not most or self._slots.has_room(tenant, most)

    async def _wait(self, number: int, tenant: str, weight: int, cost: int) -> status_pb2.Status | None:
        if not self._queue.of(tenant) and self._has_room(tenant):
            self._slots.take(number, tenant)
            return None
        waiting = _Waiting(number)
        self._queue.push(tenant, waiting, weight, cost)
        self._drop_one()
        try:
            async with asyncio.timeout(self._patience_s):
                return await waiting.result
        except TimeoutError:
            return _refused(f"a request of tenant {tenant!r} waited {self._patience_s:g} s for a replica")
        finally:
            self._queue.remove(tenant, waiting)

    def _drop_one(self) -> None:
        """If too many wait, refuses the newest request of the tenant that has most."""
        if len(self._queue) <= WAITING_MOST:
            return
        tenant, count = max(self._queue.tenants(), key=lambda it: it[1])
        newest = self._queue.newest(tenant)
        self._queue.remove(tenant, newest)
        if not newest.result.done():
            newest.result.set_result(_refused(f"{count} requests of tenant {tenant!r} wait for a replica"))


def _refused(sentence: str) -> status_pb2.Status:
    return rich_status.retry_later(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"{sentence}; send it again later, or fewer at a time", _RETRY_S
    )
