"""Bounds what uvicorn leaves open: the time that a client takes for the head of a request, and connections;
notices that a client left, whatever it sent ahead.

uvicorn (0.54) has a time for idle connections between two requests, and none for one that never sends a whole
head; every byte resets it.
"""

import asyncio
import select
from http import HTTPStatus
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_frontend.http import answers
from moe_frontend.http.errors import ApiError

HEAD_S: Final = 10.0
"""Seconds from the first byte of a request, or from the connection, to the end of its head."""
CONNECTIONS_MOST: Final = 1000
"""As of gRPC (moe_api.transport)."""
AHEAD_MOST: Final = 16 * 2**10
"""Bytes that a client may send behind a request which is under way."""


_TINY: Final = "the body comes in tiny chunks; send larger ones, or Content-Length"
CHUNKS_MOST: Final = 1024
"""Chunks of a body that may have any length."""
CHUNK_LEAST: Final = 256
"""Bytes that further ones have on average: each costs the event loop 7 us, whatever its length."""


class _Connection(h11.Connection):
    """Refuses bodies in tiny chunks: 44 KB in chunks of a byte stopped the event loop for 0.3 s."""

    _chunks = _bytes = 0

    @property
    def in_tiny_chunks(self) -> bool:
        return (self._chunks - CHUNKS_MOST) * CHUNK_LEAST > self._bytes

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self.in_tiny_chunks:
                raise h11.RemoteProtocolError("the body comes in tiny chunks")
        return event


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with a deadline for heads.

    `scope["state"]` has `abort`, which cuts the connection, and `left`, whether the client closed it: a busy
    event loop tells that later than the kernel.
    """

    conn: _Connection
    head_s: float = HEAD_S
    connections_most: int = CONNECTIONS_MOST
    _head: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self.conn = _Connection(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuses a connection above the bound."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort, "left": self._left}
        if len(self.connections) > self.connections_most:
            transport.abort()
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Runs the clock while no request is under way."""
        if self._idle and self._head is None:
            self._expect_head()
        super().data_received(data)
        if not self._idle:
            self._forget_head()
            self._read_on()

    def _read_on(self) -> None:
        """Sees a client leave: uvicorn reads no more when bytes follow a request that is under way."""
        ahead = self.conn.their_state is h11.DONE and not self.transport.is_closing()
        if ahead and self.flow.read_paused and len(self.conn.trailing_data[0]) <= AHEAD_MOST:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's
        """Refuses what is not HTTP; where a response has begun, the connection just ends."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            sentence = _TINY if self.conn.in_tiny_chunks else "the request is not valid HTTP; send HTTP/1.1"
            refusal = ApiError(400, sentence, close=True)
            body = answers.encode(refusal.body())
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *refusal.headers(),
            ]
            head = h11.Response(status_code=400, headers=headers, reason=HTTPStatus(400).phrase.encode())
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._forget_head()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The next request may have begun behind the last one."""
        super().on_response_complete()
        if not self._idle:
            self._forget_head()
            self._read_on()

    def _left(self) -> bool:
        descriptor = -1 if self.transport.is_closing() else self.transport.get_extra_info("socket").fileno()
        if descriptor < 0:
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLRDHUP)
        return bool(poll.poll(0))

    @property
    def _idle(self) -> bool:
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete

    def _expect_head(self) -> None:
        self._head = self.loop.call_later(self.head_s, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None
