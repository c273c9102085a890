"""Opens channels to pods: over mutual TLS to those that serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc

from moe_api import mutual, transport
from moe_api.address import join
from moe_api.tls import KeyPair
from moe_operator.resources import names, peers

Options = Sequence[tuple[str, Any]]
_SERVERS: Final = {names.ROLE_WORKER: mutual.WORKER, names.ROLE_FRONTEND: mutual.FRONTEND}


class Dialer:
    """Opens channels. Thread-safe.

    identity: the operator's certificate for the pods of a namespace; None if it has none yet. A pod with TLS
    then counts as one that does not respond.
    """

    def __init__(self, identity: Callable[[str], KeyPair | None] = lambda _: None) -> None:
        self._identity = identity

    def channel(self, address: str, options: Options = ()) -> grpc.Channel:
        """A channel to an address as in `moe_operator.resources.peers`."""
        peer = peers.parse(address)
        if not peer.role:
            return grpc.insecure_channel(target(peer.address), options=options)
        credentials, named = self._secured(peer)
        return grpc.secure_channel(target(peer.address), credentials, options=(*options, *named))

    def aio_channel(self, address: str, options: Options = ()) -> grpc.aio.Channel:
        """Like `channel`, for asyncio."""
        peer = peers.parse(address)
        if not peer.role:
            return grpc.aio.insecure_channel(target(peer.address), options=options)
        credentials, named = self._secured(peer)
        return grpc.aio.secure_channel(target(peer.address), credentials, options=(*options, *named))

    def current(self, address: str) -> KeyPair | None:
        """The certificate that a channel opened now would use: another one needs another channel."""
        peer = peers.parse(address)
        return self._identity(peer.namespace) if peer.role else None

    def _secured(self, peer: peers.Peer) -> tuple[grpc.ChannelCredentials, Options]:
        pair = self._identity(peer.namespace)
        # Without a certificate the handshake fails, as it does at a pod that is not what it should be.
        credentials = grpc.ssl_channel_credentials() if pair is None else mutual.channel_credentials(pair)
        return credentials, mutual.expecting(_SERVERS[peer.role])


PLAINTEXT: Final = Dialer()


def answers_up_to(most_bytes: int) -> Options:
    """Options of a channel to a pod that may send no larger answers."""
    return tuple({**dict(transport.CLIENT_OPTIONS), "grpc.max_receive_message_length": most_bytes}.items())


def target(address: str) -> str:
    """The gRPC target of a worker or a frontend at an IP address; one with a port stays as it is."""
    if address.startswith("[") or address.count(":") == 1:
        return address
    return join(address, names.GRPC_PORT)
