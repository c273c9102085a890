"""One computation that several clients with equal requests share. Belongs to one event loop."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Final, Generic, TypeVar

from moe_api.writing import Messages
from moe_frontend.outputs.answer import Saving

F = TypeVar("F")
"""Why an answer is incomplete."""

_AHEAD_MOST: Final = 64
"""Maximum messages that a computation is ahead of its fastest reader, for flow control."""


class Flight(Generic[F]):
    """Replaces the context of a client: it collects the messages of the answer for all readers.

    It has no deadline. A reader may leave at any time; the computation ends when the last one has left.

    Args:
        metadata: of the request that started it.

    Attributes:
        messages: of the answer so far.
        ended: whether the answer has ended.
        waited_s: time for which the computation waited for readers.
        saving: what each reader but the first saved; None until the answer is complete.
        blocked_since: when it began to wait for its readers; None: it does not.
    """

    def __init__(self, metadata: Iterable[Any] | None) -> None:
        self._metadata = tuple(metadata or ())
        self._positions: dict[int, int] = {}
        self._followers = 0
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        self._trailing: Any = ()
        self._failure: F | None = None
        self.messages: list[bytes] = []
        self.ended = False
        self.waited_s = 0.0
        self.saving: Saving | None = None
        self.blocked_since: float | None = None

    @property
    def deserted(self) -> bool:
        """Whether there is no reader."""
        return not self._positions

    def invocation_metadata(self) -> Iterable[Any]:
        """As of a client's context."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """As of a client's context."""
        return None

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """As of a client's context."""
        self._trailing = trailing_metadata

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """As of a client's context."""

    async def write(self, message: bytes) -> None:
        """As of a client's context; waits if all readers are far behind.

        It needs no timeout: a reader that reads nothing leaves after that of its own writer, and nobody joins
        a computation that has waited as long.
        """
        self.messages.append(message)
        _wake(self._news)
        began = time.monotonic()
        try:
            while self._positions and len(self.messages) - max(self._positions.values()) > _AHEAD_MOST:
                self.blocked_since = began
                await self._taken.wait()
        finally:
            if self.blocked_since is not None:
                self.waited_s += time.monotonic() - began
            self.blocked_since = None

    def end(self, failure: F | None) -> None:
        """Ends the answer; `failure`: why it is incomplete."""
        self._failure, self.ended = failure, True
        _wake(self._news)

    async def follow(self, caller: Any, writer: Messages) -> F | None:
        """Sends all messages to a client; returns why the answer is incomplete, or None.

        Raises:
            SlowReaderError: the client does not read them.
        """
        self._followers += 1
        number, sent = self._followers, 0
        self._positions[number] = 0
        try:
            while sent < len(self.messages) or not self.ended:
                if sent == len(self.messages):
                    await self._news.wait()
                    continue
                await writer.write(self.messages[sent])
                sent = self._positions[number] = sent + 1
                _wake(self._taken)
        finally:
            del self._positions[number]
            _wake(self._taken)
        if self._trailing:
            caller.set_trailing_metadata(self._trailing)
        return self._failure


def _wake(event: asyncio.Event) -> None:
    """Wakes all present waiters."""
    event.set()
    event.clear()
