"""A stream of server-sent events, begun with its first one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.types import Send

from moe_frontend.http import answers
from moe_frontend.http.errors import ApiError

_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on as they come
]


class EventStream:
    """Sends events; each returns when the client's connection has room for more.

    Args:
        send: of ASGI, of a response that has not begun.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self._lock = asyncio.Lock()  # the head of the response goes before all events

    async def event(self, data: bytes) -> None:
        """Sends one event; `data` has no line breaks."""
        await self._body(b"data: " + data + b"\n\n", more=True)

    async def end(self) -> None:
        """Sends the last event, ``[DONE]``."""
        await self._body(b"data: [DONE]\n\n", more=False)

    async def carry(self, generation: Awaitable[None], usage: Callable[[], bytes] | None) -> None:
        """Runs a generation that sends its chunks as events of this stream, and ends the stream.

        usage: makes the chunk that follows the last one; None: there is none.

        Raises:
            ApiError: the generation failed before its first event; later the stream reports it.
        """
        try:
            await generation
        except ApiError as error:
            if not self.begun:
                raise
            await self.fail(error)
            return
        if usage is not None:
            await self.event(usage())
        await self.end()

    async def fail(self, error: ApiError) -> None:
        """Says that the stream ends before its time, and ends it."""
        await self.event(answers.encode(error.body()))
        await self.end()

    async def _body(self, body: bytes, *, more: bool) -> None:
        async with self._lock:
            if not self.begun:
                self.begun = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
