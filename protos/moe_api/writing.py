"""Sends the messages of a stream, and stops the stream if the client does not read them.

In HTTP/2 a client can block a stream by not opening its window. The server then waits in `context.write`, and
the stream's resources (a place in a queue, a replica) stay occupied as long as the client likes. A `Writer`
bounds that wait.

grpc.aio cannot reset a stream from the server's side: the status that ends the call waits behind the unread
bytes, until the client reads them or its connection ends. So release the stream's resources first, and send
the status last:

    writer = Writer(context, timeout_s)
    try:
        async for message in messages:    # in a block that releases everything at its end
            await writer.write(message)
    except SlowReaderError as error:
        await rich_status.abort(context, error.status)
"""

import asyncio
from typing import Any, Final, Protocol

import grpc

from moe_api import rich_status

WRITE_TIMEOUT_S: Final = 30.0


class SlowReaderError(Exception):
    """The client did not read a message in time.

    Attributes:
        status: of the end of the call: ABORTED, because another replica would not help.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the stream was stopped: the client read nothing for {timeout_s:g} s; read messages as they come"
        )
        self.status = rich_status.build(grpc.StatusCode.ABORTED, str(self))


class Messages(Protocol):
    """Where the messages of one call go."""

    async def write(self, message: Any) -> None:
        """Sends a message; returns when there is room for the next one."""


class Sink(Messages, Protocol):
    """A grpc.aio.ServicerContext, or what takes its place."""

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Begins the answer."""


class Writer:
    """Sends the messages of one call.

    Args:
        context: of a call whose initial metadata has not been sent.
        timeout_s: how long one message may wait for the client to read it, in seconds.
    """

    def __init__(self, context: Sink, timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._begun = False

    async def write(self, message: Any) -> None:
        """Sends a message; returns when the client's window has room for it.

        Raises:
            SlowReaderError: it had none in time; nothing more can be sent.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                if not self._begun:
                    # A separate task: cancelling the write would leave open whether it was sent, and then the
                    # status could not be sent.
                    await self._context.send_initial_metadata(())
                    self._begun = True
                await self._context.write(message)
        except TimeoutError:
            raise SlowReaderError(self._timeout_s) from None
