"""Bounds the messages of all streams: where they become many, each one holds more tokens.

A message costs the same however many tokens it holds: 60 to 100 us of a core here, twice as much in a
frontend, and again in the client. A GPU makes more tokens in a second than a core sends messages. A saturated
edge gathers tokens, too, but then requests wait for their first token behind all messages of others.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

EACH: Final = 8
"""Messages of a round."""
PAUSE_S: Final = 0.001
"""Between two rounds; other things happen then, such as new requests.

Both give about 5,000 messages a second, which one frontend forwards.
"""


class Sends(Protocol):
    """A stream that has something for its client."""

    def send(self) -> None:
        """Lets the stream send a message now."""


def _after_pause(then: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(PAUSE_S, then)


class Pacing:
    """Lets streams send in rounds of EACH, those first that have waited longest.

    A pause begins when the streams of a round have begun to send, so that a slow core has fewer rounds.

    Args:
        after_pause: calls a function after the pause.
    """

    def __init__(self, after_pause: Callable[[Callable[[], None]], None] = _after_pause) -> None:
        self._after_pause = after_pause
        self._waiting: deque[Sends] = deque()
        self._runs = False

    def add(self, stream: Sends) -> None:
        """Lets a stream send when it is its turn; it must not be waiting already."""
        self._waiting.append(stream)
        if not self._runs:
            self._runs = True
            asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        if not self._waiting:
            self._runs = False
            return
        for _ in range(min(EACH, len(self._waiting))):
            self._waiting.popleft().send()
        # The streams that send now are ahead in the loop.
        asyncio.get_running_loop().call_soon(self._after_pause, self._round)
