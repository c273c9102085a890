"""The few rtnetlink requests the cluster's network needs: links, addresses and a default route.

Written on the bare socket (rtnetlink(7)) rather than with a library because a pod's interface is made
from a thread inside the pod's network namespace, in about a millisecond, and nothing has to be imported
there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from ipaddress import IPv4Address, IPv4Interface
from types import TracebackType

_NLMSG_ERROR = 2
_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_DELADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 16, 17, 20, 21, 24, 25
_REQUEST, _ACK, _EXCL, _CREATE = 0x1, 0x4, 0x200, 0x400
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 10, 18, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_GATEWAY = 1, 5
_UNICAST, _BLACKHOLE = 1, 6
_IFF_UP = 1
_NESTED = 0x8000
_SIOCGIFINDEX = 0x8933


def attribute(kind: int, payload: bytes) -> bytes:
    """One rtattr: length and type (16 bits each, native order), payload, zero padding to 4 bytes."""
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + b"\0" * (-length % 4)


def link_message(index: int = 0, *, up: bool = False) -> bytes:
    """struct ifinfomsg; `up` sets the interface's IFF_UP and leaves its other flags alone."""
    flag = _IFF_UP if up else 0
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flag, flag)


def link_kind(kind: str, data: bytes = b"") -> bytes:
    """The IFLA_LINKINFO attribute of a new link of that kind (bridge, veth)."""
    inner = attribute(_IFLA_INFO_KIND, kind.encode())
    if data:
        inner += attribute(_IFLA_INFO_DATA | _NESTED, data)
    return attribute(_IFLA_LINKINFO | _NESTED, inner)


def _name(name: str) -> bytes:
    return attribute(_IFLA_IFNAME, name.encode() + b"\0")


def _hardware_address(address: IPv4Address) -> bytes:
    """An Ethernet address that is always the same for an IP address (locally administered: 0a).

    Neighbours remember it for a while. Were it chosen by chance, what they send to an IP address that changed
    hands would be lost until they ask anew, after 5 s and more.
    """
    return attribute(_IFLA_ADDRESS, b"\x0a\x58" + address.packed)


class Netlink:
    """A netlink socket in the network namespace of the thread that makes it; it stays there."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._socket.close()

    def _request(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Sends one request and waits for its acknowledgement; raises OSError with the kernel's errno."""
        self._sequence += 1
        header = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, self._sequence, 0)
        self._socket.send(header + body)
        reply = self._socket.recv(65536)
        (reply_kind,) = struct.unpack_from("=H", reply, 4)
        (code,) = struct.unpack_from("=i", reply, 16)
        if reply_kind == _NLMSG_ERROR and code:
            raise OSError(-code, f"netlink request {kind}: {os.strerror(-code)}")

    def _index(self, name: str) -> int:
        """The interface's index in the socket's namespace, which need not be the calling thread's."""
        request = struct.pack("=16sI20x", name.encode(), 0)
        index: int = struct.unpack_from("=I", fcntl.ioctl(self._socket, _SIOCGIFINDEX, request), 16)[0]
        return index

    def add_bridge(self, name: str, address: IPv4Address) -> None:
        """Makes a bridge, with the Ethernet address that belongs to this IP address.

        Without one of its own a bridge takes the lowest of its ports', and changes it as ports come and go.
        """
        body = link_message() + _name(name) + _hardware_address(address) + link_kind("bridge")
        self._request(_RTM_NEWLINK, body, _CREATE | _EXCL)

    def add_veth(self, name: str, master: str, peer: str, peer_namespace: int, address: IPv4Address) -> None:
        """Makes a pair: `name` up in this namespace as a port of bridge `master`, `peer` in another
        namespace.

        Args:
            name: this end's interface name, at most 15 characters.
            master: the bridge's name.
            peer: the other end's name.
            peer_namespace: an open /proc/PID/ns/net.
            address: which the peer will get; its Ethernet address belongs to it.
        """
        other = link_message() + _name(peer) + _hardware_address(address)
        other += attribute(_IFLA_NET_NS_FD, struct.pack("=I", peer_namespace))
        body = link_message(up=True) + _name(name)
        body += attribute(_IFLA_MASTER, struct.pack("=I", self._index(master)))
        body += link_kind("veth", attribute(_VETH_INFO_PEER | _NESTED, other))
        self._request(_RTM_NEWLINK, body, _CREATE | _EXCL)

    def set_up(self, name: str) -> None:
        """Brings an interface up."""
        self._request(_RTM_NEWLINK, link_message(self._index(name), up=True))

    def delete_link(self, name: str) -> None:
        """Removes an interface; that it is gone already is fine."""
        try:
            index = self._index(name)
            self._request(_RTM_DELLINK, link_message(index))
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ENXIO):
                raise

    def add_address(self, name: str, address: IPv4Interface) -> None:
        """Gives an interface an address; that it has it already is fine."""
        try:
            self._request(_RTM_NEWADDR, _address(self._index(name), address), _CREATE | _EXCL)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise

    def delete_address(self, name: str, address: IPv4Interface) -> None:
        """Takes an address from an interface."""
        self._request(_RTM_DELADDR, _address(self._index(name), address))

    def add_default_route(self, gateway: IPv4Address) -> None:
        """Sends everything that is not on a connected network to `gateway`."""
        body = _route(0, _UNICAST) + attribute(_RTA_GATEWAY, gateway.packed)
        self._request(_RTM_NEWROUTE, body, _CREATE | _EXCL)

    def add_dropping_route(self, address: IPv4Address) -> None:
        """Drops everything that is sent to `address`, also over connections that exist."""
        self._request(_RTM_NEWROUTE, _dropping(address), _CREATE | _EXCL)

    def delete_dropping_route(self, address: IPv4Address) -> None:
        """Lets packets to `address` through again."""
        self._request(_RTM_DELROUTE, _dropping(address))


def _route(prefix: int, kind: int) -> bytes:
    """struct rtmsg: the main table is 254, protocol static 4, scope universe 0."""
    return struct.pack("=BBBBBBBBI", socket.AF_INET, prefix, 0, 0, 254, 4, 0, kind, 0)


def _dropping(address: IPv4Address) -> bytes:
    return _route(32, _BLACKHOLE) + attribute(_RTA_DST, address.packed)


def _address(index: int, address: IPv4Interface) -> bytes:
    head = struct.pack("=BBBBI", socket.AF_INET, address.network.prefixlen, 0, 0, index)
    return head + attribute(_IFA_LOCAL, address.ip.packed) + attribute(_IFA_ADDRESS, address.ip.packed)
