"""Where pods respond to the operator, as text.

``IP`` or ``HOST:PORT``; with mutual TLS ``tls://ROLE.NAMESPACE@HOST:PORT``: the certificate has to prove the
role, and comes from the authority of the namespace.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from moe_api.address import join

_SCHEME: Final = "tls://"


class Peer(NamedTuple):
    """A parsed address."""

    address: str
    role: str = ""
    """Empty: plaintext."""
    namespace: str = ""


def secure(role: str, namespace: str, host: str, port: int) -> str:
    """The address of a pod with mutual TLS. host: an IP address."""
    return f"{_SCHEME}{role}.{namespace}@{join(host, port)}"


def parse(text: str) -> Peer:
    """Reads an address, as `secure` writes it or without TLS."""
    if not text.startswith(_SCHEME):
        return Peer(text)
    identity, _, address = text.removeprefix(_SCHEME).partition("@")
    role, _, namespace = identity.partition(".")
    return Peer(address, role, namespace)
