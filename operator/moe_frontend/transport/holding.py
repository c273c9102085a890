"""Holds requests while no replica is ready, and reports their number to the operator."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Final

import grpc
from google.rpc import status_pb2
from opentelemetry import metrics

from moe_api import rich_status

NO_DEPLOYMENT: Final = "this frontend"
"""In place of a deployment's name, where a frontend has workers by address."""
HELD_MOST: Final = 1000
"""Maximum number of held requests of one frontend."""
HELD_BYTES_MOST: Final = 256 * 2**20
"""Maximum bytes of these requests: each keeps its prompt in memory."""
RETRY_AFTER_S: Final = 5.0


@dataclasses.dataclass
class Hold:
    """The requests that wait for a replica. Belongs to one event loop.

    Args:
        limit_s: maximum wait of one request, in seconds; 0 holds none.
        deployment: name, for messages.
        from_zero: whether the deployment scales to zero, so that requests are accepted without a replica.
    """

    limit_s: float
    deployment: str
    from_zero: bool = False
    _held: int = 0
    _bytes: int = 0
    _demand: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    _replicas: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def held(self) -> int:
        """Number of waiting requests."""
        return self._held

    def set_replicas(self, *, there: bool) -> None:
        """Says whether a replica is ready; the first one releases all waiting requests."""
        if there:
            self._replicas.set()
        else:
            self._replicas.clear()

    async def until_replica(self, size: int) -> status_pb2.Status | None:
        """Waits until a replica is ready; returns why the request ends if that takes too long.

        size: of the request, in bytes.
        """
        if self.limit_s <= 0 or self._replicas.is_set():
            return None
        with self.place(size) as refusal:
            if refusal is not None:
                return refusal
            try:
                await asyncio.wait_for(self._replicas.wait(), self.limit_s)
            except TimeoutError:
                return self._in_vain()
        return None

    @contextlib.contextmanager
    def place(self, size: int) -> Iterator[status_pb2.Status | None]:
        """Counts a request that waits for a replica during the block; yields why it may not wait, or None.

        size: of the request, in bytes.
        """
        if self._held >= HELD_MOST or self._bytes + size > HELD_BYTES_MOST:
            sentence = f"{self._held} requests already wait for a replica of {self.deployment}; try later"
            yield rich_status.retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence, RETRY_AFTER_S)
            return
        with self._counted(size):
            yield None

    async def demand(self, wait_s: float) -> int:
        """Number of waiting requests; if there is none, waits up to `wait_s` seconds for the first one."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._demand.wait(), wait_s)
        return self._held

    def measure(self, meter: metrics.Meter) -> None:
        """Creates the instrument for waiting requests."""
        meter.create_observable_up_down_counter(
            "moe_frontend.requests.held",
            [lambda _: [metrics.Observation(self._held)]],
            "{request}",
            "Requests that wait because no replica is ready",
        )

    @contextlib.contextmanager
    def _counted(self, size: int) -> Iterator[None]:
        self._held += 1
        self._bytes += size
        self._demand.set()
        try:
            yield
        finally:
            self._held -= 1
            self._bytes -= size
            if self._held == 0:
                self._demand.clear()

    def _in_vain(self) -> status_pb2.Status:
        sentence = (
            f"{self.deployment} has no ready replica: none became ready within {self.limit_s:g} s; "
            f"{see_why(self.deployment)}"
        )
        return rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, sentence, RETRY_AFTER_S)


def see_why(deployment: str) -> str:
    """The remedy where no replica is ready."""
    if deployment == NO_DEPLOYMENT:
        return "see why in the logs of its workers"
    return f"see why with `moe status {deployment}`"
