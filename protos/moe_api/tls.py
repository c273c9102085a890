"""TLS with the files of a Secret as cert-manager writes them: tls.crt, tls.key and, for mutual TLS, ca.crt.

A renewed certificate is used for the next connection; connections that are open keep theirs.
"""

import contextlib
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

CERTIFICATE: Final = "tls.crt"
KEY: Final = "tls.key"
AUTHORITIES: Final = "ca.crt"
HANDSHAKE_S: Final = 10.0
"""How long a client may take for the TLS handshake."""


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its key, as PEM.

    certificate: with the certificates of intermediate authorities.
    authorities: that the certificates of the other side are checked against; may be empty.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    authorities: bytes = b""


def parse(files: Mapping[str, bytes]) -> KeyPair:
    """The key pair in the files of a Secret.

    Raises:
        ValueError: a file is missing, or the certificate and the key do not belong together.
    """
    missing = [name for name in (CERTIFICATE, KEY) if not files.get(name)]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}; use a Secret of type kubernetes.io/tls")
    pair = KeyPair(files[CERTIFICATE], files[KEY], files.get(AUTHORITIES, b""))
    try:
        load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), pair)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or str(error)
        sentence = f"{CERTIFICATE} and {KEY} are no certificate with its key in PEM ({reason})"
        raise ValueError(f"{sentence}; renew the Secret") from error
    return pair


def load(context: ssl.SSLContext, pair: KeyPair) -> None:
    """Makes a context use a key pair from now on, for new connections.

    Raises:
        ssl.SSLError: certificate and key do not belong together.
    """
    # ssl reads files only. A key never lies on a disk here.
    with _file(pair.certificate) as certificate, _file(pair.key) as key:
        context.load_cert_chain(certificate, key, password="")


def server_context(pair: KeyPair) -> ssl.SSLContext:
    """The context of an HTTP/1.1 server: TLS 1.2 or newer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load(context, pair)
    return context


def server_credentials(current: Callable[[], KeyPair], *, mutual: bool = False) -> grpc.ServerCredentials:
    """Credentials of a gRPC server that uses the key pair that `current` gives when a connection comes.

    Args:
        current: called in threads of gRPC; must not block.
        mutual: clients must have a certificate of one of the pair's authorities.
    """
    served = current()

    def changed() -> Any:
        nonlocal served
        pair = current()
        if pair is served:
            return None  # gRPC keeps the configuration that it has
        served = pair
        return _configuration(pair, mutual=mutual)

    return grpc.dynamic_ssl_server_credentials(_configuration(served, mutual=mutual), changed, mutual)


def _configuration(pair: KeyPair, *, mutual: bool) -> grpc.ServerCertificateConfiguration:
    roots = pair.authorities if mutual else None
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], roots)


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[str]:
    """The path of a file in memory that ends with the block."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
