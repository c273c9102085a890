"""Mutual TLS between the components of a deployment: what each proves to be, and expects of the other.

The certificates of a namespace come from an authority of that namespace alone. They name a kind of component,
not a host: pods have no names that a client could check, and their addresses change.
"""

import ssl
from collections.abc import Mapping
from typing import Final

import grpc

from moe_api import tls
from moe_api.tls import KeyPair

WORKER: Final = "worker.moe-operator.internal"
FRONTEND: Final = "frontend.moe-operator.internal"
OPERATOR: Final = "operator.moe-operator.internal"


def parse(files: Mapping[str, bytes]) -> KeyPair:
    """The key pair in the files of a Secret, with the authorities that the other side's comes from.

    Raises:
        ValueError: a file is missing or not valid.
    """
    pair = tls.parse(files)
    if not pair.authorities:
        raise ValueError(f"it has no {tls.AUTHORITIES}, which the other side is checked against; add it")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pair.authorities.decode())
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"{tls.AUTHORITIES} has no certificate in PEM ({error}); renew the Secret"
        ) from error
    return pair


def channel_credentials(pair: KeyPair) -> grpc.ChannelCredentials:
    """Credentials of a client; those of a channel never change, so a renewed pair needs another channel."""
    return grpc.ssl_channel_credentials(pair.authorities, pair.key, pair.certificate)


def expecting(server: str) -> tuple[tuple[str, str], ...]:
    """Options of a channel whose server has to have this name in its certificate."""
    return (("grpc.ssl_target_name_override", server),)
