"""One computation that several clients of equal requests follow. For one event loop."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final, Generic, TypeVar

from moe_api.writing import Writer

F = TypeVar("F")
"""Why an answer is not whole."""

_AHEAD_MOST: Final = 64
"""Messages that a computation may be ahead of its fastest reader: flow control reaches through."""


class Flight(Generic[F]):
    """Takes the place of a client's context: it collects the messages of the answer for all followers.

    It has no deadline of its own. Whoever follows may leave at any time; the computation ends when nobody
    follows it any more.

    Args:
        metadata: of the request that began it.

    Attributes:
        messages: of the answer so far.
        ended: whether there will be no more.
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

    @property
    def deserted(self) -> bool:
        """Whether nobody follows."""
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
        """As of a client's context; waits where all followers are far behind."""
        self.messages.append(message)
        _wake(self._news)
        while self._positions and len(self.messages) - max(self._positions.values()) > _AHEAD_MOST:
            await self._taken.wait()

    def end(self, failure: F | None) -> None:
        """The computation has ended."""
        self._failure, self.ended = failure, True
        _wake(self._news)

    async def follow(self, caller: Any, writer: Writer) -> F | None:
        """Passes all messages to a client; returns why the answer is not whole, if it is not.

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
    """Wakes who waits now."""
    event.set()
    event.clear()
