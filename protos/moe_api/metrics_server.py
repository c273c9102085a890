"""Serves the process's metrics for Prometheus, at /metrics."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from moe_api import listening
from moe_api.supervision import Supervisor

_LOG: Final = logging.getLogger(__name__)
CONNECTIONS_MOST: Final = 16
"""At a time. Prometheus opens one, for milliseconds."""


class _Handler(WSGIRequestHandler):
    """Logs no requests, and closes the connection of a silent client."""

    timeout = 10  # seconds

    def log_message(self, *_: Any) -> None:
        """Prometheus scrapes every few seconds, which nobody wants to read."""


class _Server(ThreadingWSGIServer):
    """A thread for each of a few connections; a further one ends the oldest, which may be idle."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._connections: dict[int, socket.socket] = {}
        self._lock = threading.Lock()

    def server_bind(self) -> None:
        """Listens on both families; http.server asks for one, and looks the host's name up."""
        self.socket.close()
        self.socket = listening.listen(str(self.server_address[0]), self.server_address[1])
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "", self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Called by the thread that accepts."""
        with self._lock:
            if len(self._connections) >= CONNECTIONS_MOST:
                oldest = self._connections.pop(next(iter(self._connections)))
                with contextlib.suppress(OSError):  # it has ended
                    oldest.shutdown(socket.SHUT_RDWR)
            self._connections[id(request)] = request
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Called by the thread of a connection when it ends."""
        with self._lock:
            self._connections.pop(id(request), None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - socketserver's
        """Clients that leave are no errors of this process."""
        _LOG.debug("a request for metrics ended early", exc_info=True)


class PortTakenError(Exception):
    """The port for metrics is not available."""


class MetricsServer:
    """A bound port; `start` begins to serve there.

    Raises:
        PortTakenError: the port is not available.
    """

    def __init__(self, port: int) -> None:
        try:
            self._server = make_server(
                "",  # Prometheus scrapes from another pod
                port,
                make_wsgi_app(),
                _Server,
                _Handler,
            )
        except (OSError, OverflowError) as error:
            raise PortTakenError(f"metrics port {port} is not available: {error}") from error
        self._stopping = threading.Event()

    @property
    def port(self) -> int:
        """The port."""
        return int(self._server.server_port)

    def start(self, supervisor: Supervisor) -> None:
        """Serves requests in supervised threads."""
        supervisor.start_thread("metrics", self._server.serve_forever, self._stopping)

    def stop(self) -> None:
        """Ends it."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
