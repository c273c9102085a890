"""The node's network agent: what kube-proxy, CoreDNS and `kubectl port-forward` are elsewhere.

Watches Services and EndpointSlices; listens at every service's address and relays to its ready endpoints;
answers DNS; relays the API server's host port, and the host ports that `forward` hands over.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import logging
import socket
import threading
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Interface

from localcluster.errors import ForwardError
from localcluster.layout import API_PORT, API_SERVICE_ADDRESS, DNS_ADDRESS, INSIDE, NODE_ADDRESS
from localcluster.netlink import Netlink
from localcluster.network import catalog, dns, relay
from localcluster.network.catalog import Address, Catalog, ServicePort
from localcluster.network.watch import AgentTransport
from moe_api.listwatch import Collection, ListWatch, Manifest, Snapshot, Transport
from moe_api.supervision import Backoff, Supervisor

_API_LISTENER_FD = 3
_SERVICES = "/api/v1/services"
_SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
_PERMANENT = {str(API_SERVICE_ADDRESS), str(DNS_ADDRESS)}
_NOTICE_S = 10.0
"""The reason why connections are reset is told this often at most."""
_BACKOFF = Backoff(first_s=0.5, longest_s=5.0)
_log = logging.getLogger(__name__)


class Agent:
    """Keeps listeners in step with the services of the cluster."""

    def __init__(self) -> None:
        self._transport: Transport = AgentTransport()
        self._supervisor = Supervisor(backoff=_BACKOFF, expected=(OSError, http.client.HTTPException))
        self._stopping = threading.Event()
        self._objects: dict[str, Mapping[str, Manifest]] = {_SERVICES: {}, _SLICES: {}}
        self.catalog: Catalog = catalog.build({}, {})
        self._servers: dict[ServicePort, asyncio.Server] = {}
        self._addresses: set[str] = set()
        self._changed = asyncio.Event()

    def lookup(self, name: str) -> tuple[IPv4Address, ...] | None:
        """The addresses of a DNS name; None where it does not exist."""
        found = self.catalog.records.get(name)
        if found is None and any(known.endswith(f".{name}") for known in self.catalog.records):
            return ()  # a name with others below it exists, without addresses (RFC 8020)
        return found

    def watch(self) -> None:
        """Starts following the API server, in threads that end with the process."""
        loop = asyncio.get_running_loop()
        for path in (_SERVICES, _SLICES):

            def changed(objects: Mapping[str, Manifest], path: str = path) -> None:
                loop.call_soon_threadsafe(self._update, path, objects)

            source = Collection(self._transport, path)
            follow = ListWatch(source, Snapshot(changed), self._stopping).run
            self._supervisor.start_thread("watch", follow, self._stopping, path)

    def _update(self, path: str, objects: Mapping[str, Manifest]) -> None:
        self._objects[path] = objects
        self.catalog = catalog.build(self._objects[_SERVICES], self._objects[_SLICES])
        self._changed.set()

    async def keep_listening(self) -> None:
        """Opens and closes listeners as services come and go. Never returns."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = self.catalog.listeners()
            for port in self._servers.keys() - wanted.keys():
                self._servers.pop(port).close()
            self._set_addresses({address.host for address in wanted.values()} - _PERMANENT)
            for port in wanted.keys() - self._servers.keys():
                await self._listen(wanted[port], port)

    def _set_addresses(self, wanted: set[str]) -> None:
        with Netlink() as netlink:
            for host in wanted - self._addresses:
                netlink.add_address("lo", IPv4Interface(f"{host}/32"))
            for host in self._addresses - wanted:
                netlink.delete_address("lo", IPv4Interface(f"{host}/32"))
        self._addresses = wanted

    async def _listen(self, address: Address, port: ServicePort) -> None:
        choose = relay.RoundRobin(lambda: self.catalog.behind(port))
        try:
            server = await asyncio.start_server(relay.handler(choose), address.host, address.port)
        except OSError as error:
            _log.warning("service %s cannot listen at %s: %s", port.service, address, error)
        else:
            self._servers[port] = server

    async def forward(self, control: socket.socket) -> None:
        """Serves one forward: takes a listening socket of the host, and relays its connections while
        `control` is open.

        The request is JSON, {"namespace", "service", "port"}, and comes together with the socket's descriptor
        (SCM_RIGHTS). The answer is a line of JSON, {"error": TEXT}, empty for success. Lines {"notice": TEXT}
        follow while there is no pod to relay to.
        """
        control.setblocking(True)
        request, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, control, 65536, 1)
        control.setblocking(False)
        loop = asyncio.get_running_loop()
        if not request:
            return
        listener = socket.socket(fileno=descriptors[0])
        try:
            port = self.catalog.find(**json.loads(request))
        except ForwardError as error:
            listener.close()
            await loop.sock_sendall(control, _line(error=str(error)))
            return
        choose = relay.RoundRobin(lambda: self.catalog.behind(port))
        told = float("-inf")

        def tell() -> None:
            nonlocal told
            if loop.time() - told >= _NOTICE_S:
                told = loop.time()
                with contextlib.suppress(OSError):  # nobody reads, or the forward has ended
                    control.send(_line(notice=self.catalog.lacks(port)))

        server = await asyncio.start_server(relay.handler(choose, tell), sock=listener)
        await loop.sock_sendall(control, _line(error=""))
        if not self.catalog.behind(port):
            tell()
        with contextlib.suppress(ConnectionError):
            await loop.sock_recv(control, 1)
        server.close()

    async def serve_forwards(self) -> None:
        """Accepts requests for forwards. Never returns."""
        INSIDE.network_socket.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(INSIDE.network_socket))
            listener.listen()
            listener.setblocking(False)
            while True:
                control, _ = await loop.sock_accept(listener)
                self._supervisor.start_once(
                    "forward", functools.partial(self._forward_and_close, control), str(control.fileno())
                )

    async def _forward_and_close(self, control: socket.socket) -> None:
        with control:
            await self.forward(control)

    async def run(self) -> None:
        """Serves DNS, services and forwards until the process ends."""
        self.watch()
        await dns.serve(self.lookup)
        await asyncio.gather(
            self._supervisor.start("services", self.keep_listening),
            self._supervisor.start("forwards", self.serve_forwards),
        )


def _line(**members: str) -> bytes:
    return json.dumps(members).encode() + b"\n"


async def main() -> None:
    """Runs the agent until the process ends."""
    api = [Address(str(NODE_ADDRESS), API_PORT)]
    listener = socket.socket(fileno=_API_LISTENER_FD)
    await asyncio.start_server(relay.handler(lambda: api), sock=listener)
    await Agent().run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(main())
