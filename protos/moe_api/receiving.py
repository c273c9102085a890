"""Bounds what all requests of a gRPC server hold together, while they arrive and afterwards.

gRPC's core keeps a message until it is complete and bounds each by `grpc.max_receive_message_length`. It has
no bound of all messages that can be set from Python. But it grants a stream the window for a whole message
only once the server reads: before that, a call holds 64 KiB at most. So a server bounds the sum if few of its
calls read at a time and the others wait.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeVar

import grpc
from google.rpc import status_pb2

from moe_api import rich_status

BYTES_MOST: Final = 256 * 2**20
"""Bytes of all messages that are being received; as many again of those whose calls are in progress. Bodies
of HTTP requests count as in progress from their first byte on."""
SMALL: Final = 64 * 2**10
SMALL_ONLY: Final = 64 * 2**20
"""Bytes of `BYTES_MOST` that are for requests of up to `SMALL` bytes, so that large ones do not take all."""
WAITING_MOST: Final = 1024
"""Calls that wait until their message may be received."""
LIMIT_S: Final = 30.0
CONTENDED_S: Final = 1.0
_RETRY_S: Final = 1.0
_TOO_MANY: Final = "too many large requests arrive at once; try later"
_TOO_SLOW: Final = "the request did not arrive in time; send it again, in less time"
_TOO_MUCH: Final = "the requests in progress leave no room for one of {} bytes; try later"
T = TypeVar("T")


class NotReceivedError(Exception):
    """A request did not arrive, or there was no room for it.

    Attributes:
        status: of the end of the call.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class InProgress:
    """Counts the bytes of the requests in progress, of all servers of a process.

    Args:
        most: bytes of all; `small_only` of them are for requests of up to `SMALL` bytes.
    """

    def __init__(self, most: int = BYTES_MOST, small_only: int = SMALL_ONLY) -> None:
        self.left = self._most = most
        self.small_only = small_only

    @property
    def held(self) -> int:
        """Bytes of all requests."""
        return self._most - self.left

    @contextlib.contextmanager
    def place(self, size: int = 0) -> Iterator["Place"]:
        """Counts a request of `size` bytes for the time of the block, in which it may grow.

        Raises:
            NotReceivedError: there is no room for it.
        """
        place = Place(self)
        try:
            place.grow(size)
            yield place
        finally:
            self.left += place.size


class Place:
    """The bytes of one request."""

    def __init__(self, among: InProgress) -> None:
        self._among = among
        self.size = 0

    def grow(self, by: int) -> None:
        """Counts `by` more bytes.

        Raises:
            NotReceivedError: there is no room for them; none are counted.
        """
        size = self.size + by
        if by > self._among.left - (self._among.small_only if size > SMALL else 0):
            raise NotReceivedError(_exhausted(_TOO_MUCH.format(size)))
        self._among.left -= by
        self.size = size


class Receiver:
    """Receives messages, so many at a time.

    A message may take `limit_s`. But each call that has waited for `contended_s` ends the oldest message that
    has taken as long, so that a few clients that send slowly delay others by about a second.

    Args:
        places: messages at a time.
        limit_s: how long a client may take to send a message, in seconds.
        contended_s: how long at least, in seconds.
        waiting: calls that may wait for a place.
    """

    def __init__(
        self,
        places: int,
        limit_s: float = LIMIT_S,
        contended_s: float = CONTENDED_S,
        waiting: int = WAITING_MOST,
    ) -> None:
        self._places = asyncio.Semaphore(places)
        self._limit_s = limit_s
        self._contended_s = contended_s
        self._left = waiting
        self._patient: dict[asyncio.Timeout, float] = {}

    async def receive(self, read: Callable[[], Awaitable[T]]) -> T:
        """The message that `read` gives.

        Raises:
            NotReceivedError: it did not come in time, or too many calls wait.
        """
        if self._places.locked():
            await self._wait()
        else:
            await self._places.acquire()  # returns at once
        try:
            return await self._read(read)
        finally:
            self._places.release()

    async def _wait(self) -> None:
        if not self._left:
            raise NotReceivedError(_exhausted(_TOO_MANY))
        self._left -= 1
        try:
            with _every(self._contended_s, self._hurry_oldest):
                await self._places.acquire()
        finally:
            self._left += 1

    def _hurry_oldest(self) -> None:
        oldest = next(iter(self._patient), None)
        if oldest is not None:
            end = self._patient.pop(oldest) + self._contended_s
            if not oldest.expired():
                oldest.reschedule(end)

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        # A task that goes on: of a read that is cancelled, gRPC does not free what arrives nevertheless. It
        # ends with the call.
        reading = asyncio.ensure_future(read())
        reading.add_done_callback(_retrieve)
        limit = asyncio.timeout(self._limit_s)
        try:
            async with limit:
                self._patient[limit] = asyncio.get_running_loop().time()
                return await asyncio.shield(reading)
        except TimeoutError:
            raise NotReceivedError(_exhausted(_TOO_SLOW)) from None
        finally:
            self._patient.pop(limit, None)


@contextlib.contextmanager
def _every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` again and again during the block."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def again() -> None:
        nonlocal timer
        act()
        timer = loop.call_later(seconds, again)

    timer = loop.call_later(seconds, again)
    try:
        yield
    finally:
        timer.cancel()


def _retrieve(reading: asyncio.Future[Any]) -> None:
    """An error that nobody looks at would be logged."""
    if not reading.cancelled():
        reading.exception()


def _exhausted(sentence: str) -> status_pb2.Status:
    return rich_status.retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence, _RETRY_S)
