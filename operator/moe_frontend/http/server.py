"""The port of OpenAI's API: uvicorn, in the process and the event loop of gRPC's server."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Final

import uvicorn

from moe_api import address, listening
from moe_api.supervision import Supervisor
from moe_api.tls import HANDSHAKE_S
from moe_frontend.http.gate import Gate
from moe_frontend.http.protocol import BoundedProtocol
from moe_operator.errors import InstallationError

_UNREAD_MS: Final = 30_000
"""How long a client may leave bytes unacknowledged; then the kernel gives its connection up."""
_END_S: Final = 2.0


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the process, which drains; bounds TLS handshakes, which uvicorn leaves to asyncio (60
    s).

    tls: None: plaintext.
    """

    tls: ssl.SSLContext | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop, tls = asyncio.get_running_loop(), self.tls
        await self.lifespan.startup()

        def protocol() -> asyncio.Protocol:
            return BoundedProtocol(self.config, self.server_state, self.lifespan.state)

        handshake_s, shutdown_s = (None, None) if tls is None else (HANDSHAKE_S, _END_S)
        self.servers = [
            await loop.create_server(
                protocol,
                sock=listener,
                backlog=listening.BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=handshake_s,
                ssl_shutdown_timeout=shutdown_s,
            )
            for listener in sockets or ()
        ]
        self.started = True


class HttpServer:
    """Serves an application.

    Args:
        gate: the application.
        supervisor: runs the server.
        tls: for connections; None: plaintext.
    """

    def __init__(self, gate: Gate, supervisor: Supervisor, tls: ssl.SSLContext | None = None) -> None:
        self._gate = gate
        self._supervisor = supervisor
        config = uvicorn.Config(
            gate,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=None,
        )
        # What clients do wrong is told to them, not to the log.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self._server = _Uvicorn(config)
        self._server.tls = tls
        self._running: asyncio.Task[None] | None = None

    async def start(self, at: str) -> int:
        """Listens on ``HOST:PORT`` (port 0 takes a free one) and returns the port.

        Raises:
            InstallationError: the address cannot be listened on.
        """
        listener = _listen(at)
        port: int = listener.getsockname()[1]
        self._running = self._supervisor.start("http", lambda: self._server.serve([listener]))
        return port

    async def drain(self, grace_s: float) -> None:
        """Takes no more requests, lets those that run finish for `grace_s` seconds, and stops."""
        if self._running is None:
            return
        self._gate.drain()
        self._server.should_exit = True
        await asyncio.wait([self._running], timeout=grace_s)
        self._gate.stop()
        await asyncio.wait([self._running], timeout=_END_S)
        self._server.force_exit = True
        await asyncio.wait([self._running], timeout=_END_S)


def _listen(at: str) -> socket.socket:
    try:
        listener = listening.listen(*address.split(at))
    except OSError as error:
        raise InstallationError(
            f"cannot listen on {at} for HTTP: {error.strerror}; is the port taken, or the address "
            "another machine's?"
        ) from error
    # Connections inherit these: one whose client vanished, or reads nothing, ends.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
    listener.setblocking(False)
    return listener
