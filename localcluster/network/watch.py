"""The network agent's connection to the API server, with the standard library only."""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Iterable, Iterator
from urllib.parse import urlencode

from localcluster.layout import API_PORT, INSIDE, NODE_ADDRESS
from moe_api.listwatch import ExpiredError, Query

_IDENTITY = "network-agent"
_REQUEST_S = 10


class AgentTransport:
    """Requests with the agent's certificate. Network errors stay what they are: OSError or HTTPException."""

    def get(self, path: str, query: Query) -> bytes:
        """The body of a response."""
        with _response(path, query, _REQUEST_S) as response:
            return response.read()

    @contextlib.contextmanager
    def stream(self, path: str, query: Query, silence_s: float) -> Iterator[Iterable[bytes]]:
        """The lines of a response, as they come."""
        with _response(path, query, silence_s) as response:
            yield response


@contextlib.contextmanager
def _response(path: str, query: Query, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
    connection = _connect(timeout_s)
    try:
        connection.request("GET", f"{path}?{urlencode(query)}")
        response = connection.getresponse()
        if response.status == http.client.GONE:
            raise ExpiredError
        if response.status != http.client.OK:
            raise ConnectionError(f"GET {path}: {response.status} {response.read(500)!r}")
        yield response
    finally:
        connection.close()


def _connect(timeout_s: float) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(INSIDE.pki / "ca.crt"))
    context.load_cert_chain(INSIDE.pki / f"{_IDENTITY}.crt", INSIDE.pki / f"{_IDENTITY}.key")
    return http.client.HTTPSConnection(str(NODE_ADDRESS), API_PORT, timeout=timeout_s, context=context)
