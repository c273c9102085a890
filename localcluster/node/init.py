"""PID 1 of the cluster: builds the node, and starts and supervises the components.

When it ends, the kernel ends everything else in its PID namespace, and with the last process go the
network and the mounts. It ends on SIGTERM, when a component does not start, and when `up` disappears
before it has said that the cluster shall stay.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import socket
import sys
import time
from datetime import UTC, datetime
from ipaddress import IPv4Interface
from typing import NoReturn

from localcluster import images
from localcluster.errors import StartError
from localcluster.layout import (
    API_SERVICE_ADDRESS,
    BRIDGE,
    DNS_ADDRESS,
    INSIDE,
    NODE_ADDRESS,
    POD_NETWORK,
    Layout,
)
from localcluster.netlink import Netlink
from localcluster.node import components, mounts, pki, probe
from localcluster.node.components import Component
from localcluster.node.supervisor import START_TIMEOUT, Supervisor, describe_failure, report
from localcluster.settings import STAY, Settings

_POLL = 0.05


def prepare_network() -> None:
    """Loopback with the first service addresses, and the bridge that pods join."""
    with Netlink() as netlink:
        netlink.set_up("lo")
        for address in (API_SERVICE_ADDRESS, DNS_ADDRESS):
            netlink.add_address("lo", IPv4Interface(f"{address}/32"))
        netlink.add_bridge(BRIDGE, NODE_ADDRESS)
        netlink.add_address(BRIDGE, IPv4Interface(f"{NODE_ADDRESS}/{POD_NETWORK.prefixlen}"))
        netlink.set_up(BRIDGE)


async def bring_up(supervisor: Supervisor, settings: Settings, progress: socket.socket) -> None:
    """Starts all components in order of their dependencies, and reports each to `up`."""

    async def start(component: Component) -> None:
        report(progress, component.name, seconds=await supervisor.start(component))

    async with asyncio.TaskGroup() as group:
        group.create_task(start(components.runtime()))
        await start(components.etcd(settings.tools))
        await start(components.api_server(settings.tools, audit=settings.audit))
        for make in (components.controller_manager, components.scheduler, components.kubelet):
            group.create_task(start(make(settings.tools)))
        group.create_task(start(components.network_agent()))
    began = time.monotonic()
    while not await asyncio.to_thread(probe.node_is_ready):
        if time.monotonic() - began > START_TIMEOUT:
            raise StartError(describe_failure("kubelet", "did not make its node Ready"))
        await asyncio.sleep(_POLL)
    report(progress, "node", seconds=time.monotonic() - began)


async def _serve_control(
    supervisor: Supervisor, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """One request and its answer, a JSON object a line."""
    answer = await supervisor.answer(json.loads(await reader.readline() or b"{}"))
    writer.write(json.dumps(answer).encode() + b"\n")
    writer.close()


async def supervise(settings: Settings, listener: socket.socket, progress: socket.socket) -> None:
    """Brings the cluster up, learns how long it shall stay, and runs until then, at most until SIGTERM.

    Raises:
        StartError: a component did not start.
        ConnectionError: `up` has gone before the cluster was ready.
    """
    loop = asyncio.get_running_loop()
    supervisor = Supervisor(listener)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGCHLD, supervisor.reap)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_unix_server(
        functools.partial(_serve_control, supervisor), INSIDE.control_socket
    )
    starting = asyncio.ensure_future(bring_up(supervisor, settings, progress))
    progress.setblocking(False)
    word = asyncio.ensure_future(loop.sock_recv(progress, 1))
    await asyncio.wait([starting, word], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        raise ConnectionError("`up` ended before the cluster was ready")
    await starting
    stopped = asyncio.ensure_future(stop.wait())
    async with server:
        if await word == STAY:
            progress.close()
            await stopped
        else:
            # The process that asked for the cluster keeps its end open for as long as it wants it, or lives.
            gone = asyncio.ensure_future(loop.sock_recv(progress, 1))
            await asyncio.wait([stopped, gone], return_when=asyncio.FIRST_COMPLETED)


def main(layout: Layout, settings: Settings, listener: socket.socket, progress: socket.socket) -> NoReturn:
    """The whole life of PID 1."""
    try:
        mounts.build(layout, settings)
        prepare_network()
        pki.write_all(INSIDE, listener.getsockname()[1], datetime.now(UTC))
        images.write_defaults(INSIDE.images, settings.tools)
        components.KUBELET_DIRECTORY.mkdir(parents=True)
        components.write_kubelet_configuration()
        components.write_audit_policy()
        asyncio.run(supervise(settings, listener, progress))
    except* (StartError, OSError) as group:
        progress.setblocking(True)
        report(progress, "cluster", error="; ".join(_leaves(group)))
        sys.stderr.write("\n".join(_leaves(group)) + "\n")
        os._exit(1)
    # Not sys.exit: nothing needs cleanup here, and the kernel does the rest.
    os._exit(0)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[str]:
    leaves: list[str] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [str(error)]
    return leaves
