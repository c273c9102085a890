"""Opens channels to workers: over mutual TLS to those that serve it."""

from collections.abc import Callable
from typing import Final

import grpc

from moe_api import mutual, transport
from moe_api.tls import KeyPair
from moe_frontend.discovery.endpoints import Endpoint

# Pods reuse addresses: with its own channel a replica does not inherit the backoff of its predecessor.
_OPTIONS: Final = (*transport.CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1))


class Connector:
    """Opens channels.

    A channel keeps the certificate that it was opened with.

    Args:
        identity: returns the certificate of this frontend, with the authorities that workers' come from;
            None: it has none, so connections to workers with TLS fail.
    """

    def __init__(self, identity: Callable[[], KeyPair] | None = None) -> None:
        self._identity = identity

    def channel(self, endpoint: Endpoint) -> grpc.aio.Channel:
        """A new channel to a worker, without a connection yet."""
        if not endpoint.secure:
            return grpc.aio.insecure_channel(endpoint.address, options=_OPTIONS)
        if self._identity is None:
            credentials = grpc.ssl_channel_credentials()
        else:
            credentials = mutual.channel_credentials(self._identity())
        options = (*_OPTIONS, *mutual.expecting(mutual.WORKER))
        return grpc.aio.secure_channel(endpoint.address, credentials, options=options)
