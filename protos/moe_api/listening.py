"""Opens sockets that accept connections."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Final

BACKLOG: Final = 1024
_ELSEWHERE: Final = errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that accepts connections at a name or an IP address; port 0 takes a free one.

    "0.0.0.0", "::" and "" mean all addresses of this machine, as they do for gRPC: of both families, or of
    IPv4 if the machine has no IPv6. So one command line suits every cluster.

    Raises:
        OSError: the address cannot be listened on.
        OverflowError: the port is not between 0 and 65535.
    """
    if not 0 <= port < 1 << 16:  # getaddrinfo would take 70000 for 4464
        raise OverflowError("port must be 0-65535")
    if not _is_every(host):
        return _first(host, port)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
        )
    return socket.create_server(("0.0.0.0", port), backlog=BACKLOG)  # noqa: S104


def _is_every(host: str) -> bool:
    """Also of another spelling, such as ::0."""
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _first(host: str, port: int) -> socket.socket:
    """At the first address of a name that belongs to this machine."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, _, _, _, address in found[:-1]:
        try:
            return socket.create_server(address, family=family, backlog=BACKLOG)
        except OSError as error:  # clients would reach whoever has the port at this address
            if error.errno not in _ELSEWHERE:
                raise
    family, _, _, _, address = found[-1]
    return socket.create_server(address, family=family, backlog=BACKLOG)
