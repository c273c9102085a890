"""Serves the process's metrics for Prometheus, at /metrics."""

from __future__ import annotations

import threading
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from moe_api.supervision import Supervisor


class _Handler(WSGIRequestHandler):
    """Logs no requests, and closes the connection of a silent client."""

    timeout = 10  # seconds

    def log_message(self, *_: Any) -> None:
        """Prometheus scrapes every few seconds, which nobody wants to read."""


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
                "0.0.0.0",  # noqa: S104 - Prometheus scrapes from another pod
                port,
                make_wsgi_app(),
                ThreadingWSGIServer,
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
