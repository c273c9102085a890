"""Sends the messages of a stream, and gives up a client that does not read them.

HTTP/2 lets a client stop a stream by opening no window for it. The server then waits in `context.write`, and
what the stream holds (a place in a queue, a replica) is held as long as the client likes. A `Writer` bounds
that wait.

grpc.aio cannot reset a stream from the server's side: the status that ends the call waits behind the bytes
that the client does not read, until the client reads them or its connection ends. Therefore release what the
stream holds first, and send the status last:

    writer = Writer(context, timeout_s)
    try:
        async for message in messages:    # in a block that releases everything at its end
            await writer.write(message)
    except SlowReaderError as error:
        await rich_status.abort(context, error.status)
"""

import asyncio
from typing import Any, Final

import grpc

from moe_api import rich_status

WRITE_TIMEOUT_S: Final = 30.0


class SlowReaderError(Exception):
    """The client did not read a message in time.

    Attributes:
        status: what to end the call with: ABORTED, which no other replica can help with.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the stream was stopped: the client read nothing for {timeout_s:g} s; read messages as they come"
        )
        self.status = rich_status.build(grpc.StatusCode.ABORTED, str(self))


class Writer:
    """Sends the messages of one call.

    Args:
        context: of a call whose initial metadata has not been sent.
        timeout_s: how long one message may wait for the client to read it, in seconds.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._begun = False

    async def write(self, message: Any) -> None:
        """Sends a message; returns when the client's window had room for it.

        Raises:
            SlowReaderError: there was none in time; nothing more can be written.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                if not self._begun:
                    # On its own: a write that is given up would leave open whether it was sent, and the
                    # status cannot be sent then.
                    await self._context.send_initial_metadata(())
                    self._begun = True
                await self._context.write(message)
        except TimeoutError:
            raise SlowReaderError(self._timeout_s) from None
