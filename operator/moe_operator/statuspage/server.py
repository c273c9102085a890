"""The port of the page, on the loopback interface: who may see it depends on `kubectl port-forward`."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client.exposition import ThreadingWSGIServer

from moe_api.supervision import Supervisor
from moe_operator.errors import InstallationError

logger = logging.getLogger(__name__)
_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
_HOSTS: Final = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")
_SECURITY: Final = [
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]


class _Handler(WSGIRequestHandler):
    """Logs no requests, and closes the connection of a silent client."""

    timeout = 10  # seconds

    def log_message(self, *_: Any) -> None:
        """Not logged: pages ask every few seconds."""


class StatusServer:
    """A bound port; `start` begins to serve there.

    Args:
        port: 0 takes a free one.

    Raises:
        InstallationError: the port is not available.
    """

    def __init__(self, port: int) -> None:
        self._read: Callable[[], dict[str, Any]] = dict
        page = resources.files("moe_operator.statuspage").joinpath("page.html").read_text()
        self._page, self._policy = page.encode(), content_policy(page)
        self._stopping = threading.Event()
        try:
            self._server = make_server("127.0.0.1", port, self._answer, ThreadingWSGIServer, _Handler)
        except (OSError, OverflowError) as error:
            sentence = f"port {port} of the status page is not available: {error}"
            raise InstallationError(f"{sentence}; set another MOE_OPERATOR_STATUS_PORT") from error

    @property
    def port(self) -> int:
        """The port."""
        return int(self._server.server_port)

    def start(self, supervisor: Supervisor, read: Callable[[], dict[str, Any]]) -> None:
        """Serves requests in supervised threads. read: what the page shows, as JSON values."""
        self._read = read
        supervisor.start_thread("status page", self._server.serve_forever, self._stopping)

    def stop(self) -> None:
        """Ends it."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, kind, body = self._found(environ)
        policy = ("Content-Security-Policy", self._policy)
        length = ("Content-Length", str(len(body)))
        start_response(status, [("Content-Type", kind), length, policy, *_SECURITY])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _found(self, environ: WSGIEnvironment) -> tuple[str, str, bytes]:
        """Status, content type and body."""
        plain = "text/plain; charset=utf-8"
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return "405 Method Not Allowed", plain, b"this page can only be read; use GET\n"
        if not _HOSTS.fullmatch(environ.get("HTTP_HOST", "")):
            # A page of another site whose name leads here (DNS rebinding).
            return (
                "421 Misdirected Request",
                plain,
                b"this host is not served here; use localhost, by kubectl port-forward\n",
            )
        match environ["PATH_INFO"]:
            case "/":
                return "200 OK", "text/html; charset=utf-8", self._page
            case "/status.json":
                try:
                    found = self._read()
                except Exception:  # whatever fails, the page says so
                    logger.exception("the status page cannot be filled")
                    return "500 Internal Server Error", plain, b"the operator's log says why this failed\n"
                return "200 OK", "application/json", json.dumps(found).encode()
            case _:
                return "404 Not Found", plain, b"this path does not exist; use / or /status.json\n"


def content_policy(page: str) -> str:
    """Allows the page its own script and style, named by their digests, and what it asks of this server."""
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(allowed['script'])}; "
        f"style-src {' '.join(allowed['style'])}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
