"""Pod sandboxes: a network, host name and IPC namespace for each pod, held by open descriptors, without a
process.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

from localcluster import linux
from localcluster.layout import BRIDGE, NODE_ADDRESS, POD_NETWORK
from localcluster.netlink import Netlink

_KINDS = ("net", "uts", "ipc")


@dataclass(frozen=True)
class Namespaces:
    """The namespaces of a pod and its address.

    Attributes:
        descriptors: open namespace descriptors, to enter by setns(2); the namespaces live as long as they
            are open or in use.
        address: the pod's own, or the node's for a pod in the node's network.
        interface: the node's end of the pod's cable; empty for a pod in the node's network.
    """

    descriptors: tuple[int, ...]
    address: IPv4Address
    interface: str

    def close(self) -> None:
        """Takes the pod off the network and lets the namespaces go."""
        if self.interface:
            with Netlink() as netlink:
                netlink.delete_link(self.interface)
        for descriptor in self.descriptors:
            os.close(descriptor)


class AddressPool:
    """Hands out pod addresses in turn, so that one just released is not used again at once."""

    def __init__(self) -> None:
        self._addresses = [a for a in POD_NETWORK.hosts() if a != NODE_ADDRESS]
        self._next = 0

    def take(self, used: Iterable[IPv4Address]) -> IPv4Address:
        """The next address that is not in `used`; raises OSError when all are."""
        taken = set(used)
        for _ in self._addresses:
            candidate = self._addresses[self._next % len(self._addresses)]
            self._next += 1
            if candidate not in taken:
                return candidate
        raise OSError(
            f"all {len(self._addresses)} pod addresses of {POD_NETWORK} are in use; delete some pods"
        )


def make(pod_id: str, hostname: str, address: IPv4Address | None) -> Namespaces:
    """Makes a pod's namespaces and connects them to the bridge.

    Done by a thread that enters new namespaces and then ends: they belong to threads, not to processes
    (unshare(2)), and opened descriptors keep them alive.

    Args:
        pod_id: hexadecimal; its beginning names the interface.
        hostname: the pod's host name.
        address: the pod's address; None leaves it in the node's network.
    """
    results: list[Namespaces | OSError] = []

    def work() -> None:
        try:
            results.append(_make(f"veth{pod_id[:8]}", hostname, address))
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=work, name=f"sandbox-{pod_id[:8]}")
    thread.start()
    thread.join()
    if isinstance(results[0], OSError):
        raise results[0]
    return results[0]


def _make(interface: str, hostname: str, address: IPv4Address | None) -> Namespaces:
    with _netlink_if(address) as outside:
        linux.unshare(linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | (linux.CLONE_NEWNET if outside else 0))
        linux.set_hostname(hostname or socket.gethostname())
        descriptors = tuple(
            os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _KINDS
        )
        if outside is None or address is None:
            return Namespaces(descriptors, NODE_ADDRESS, "")
        outside.add_veth(interface, BRIDGE, "eth0", descriptors[0], address)
        with Netlink() as inside:
            inside.set_up("lo")
            inside.add_address("eth0", IPv4Interface(f"{address}/{POD_NETWORK.prefixlen}"))
            inside.set_up("eth0")
            inside.add_default_route(NODE_ADDRESS)
    return Namespaces(descriptors, address, interface)


@contextmanager
def _netlink_if(address: IPv4Address | None) -> Iterator[Netlink | None]:
    if address is None:
        yield None
    else:
        with Netlink() as netlink:
            yield netlink
