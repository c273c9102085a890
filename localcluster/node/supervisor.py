"""PID 1 of the cluster: builds the node, starts the components, keeps them running, reaps orphans.

When it ends, the kernel ends everything else in its PID namespace, and with the last process go the
network and the mounts. It ends on SIGTERM, when a component does not start, and when `up` disappears
before it has said that the cluster shall stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, NoReturn

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
from localcluster.settings import STAY, Settings

_START_TIMEOUT = 90.0  # seconds until a component must be ready; the slowest takes 3 on an idle machine
_POLL = 0.05
_RESTART_DELAY = 1.0  # seconds; a component that cannot start must not eat a core
_LISTENER_FD = 3


def report(progress: socket.socket, component: str, *, seconds: float = 0.0, error: str = "") -> None:
    """Tells `up` that a component is ready, or that the start failed. `up` being gone is not this function's problem."""
    line = json.dumps({"component": component, "seconds": seconds, "error": error})
    with contextlib.suppress(BrokenPipeError):
        progress.sendall(line.encode() + b"\n")


@dataclass
class Running:
    """A component and its present process."""

    component: Component
    pid: int
    since: float
    restarts: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Starts components and starts them again when they end."""

    def __init__(self, listener: socket.socket) -> None:
        # Away from the low numbers, so that the dup2 onto 3 in the child is never a no-op that keeps close-on-exec.
        self._listener = fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, 100)
        self._running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, component: Component) -> Running:
        """Starts a component's process with its output appended to its log."""
        log = str(INSIDE.log(component.name))
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        if component.inherit_listener:
            actions.append((os.POSIX_SPAWN_DUP2, self._listener, _LISTENER_FD))
        environment = {**os.environ, **component.environment}
        pid = os.posix_spawn(
            component.command[0], component.command, environment, file_actions=actions, setsid=True
        )
        before = self._running.get(component.name)
        running = Running(component, pid, time.monotonic(), before.restarts + 1 if before else 0)
        self._running[component.name] = running
        return running

    def reap(self) -> None:
        """Collects ended children: components, which start again, and orphans."""
        for pid in _ended_children():
            running = next((r for r in self._running.values() if r.pid == pid), None)
            if running is not None:
                running.ended.set()
                _kill_orphans({r.pid for r in self._running.values()})
                self._keep(self._start_again(running.component))

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_again(self, component: Component) -> None:
        await asyncio.sleep(_RESTART_DELAY)
        self.spawn(component)

    async def start(self, component: Component) -> float:
        """Starts a component and waits until it is ready; returns the seconds that took.

        Raises:
            StartError: it ended, or was not ready in time.
        """
        running = self.spawn(component)
        while not await asyncio.to_thread(probe.is_ready, component.ready):
            if running.ended.is_set():
                raise StartError(_describe_failure(component.name, "ended while starting"))
            if time.monotonic() - running.since > _START_TIMEOUT:
                raise StartError(
                    _describe_failure(component.name, f"was not ready within {_START_TIMEOUT:.0f} s")
                )
            await asyncio.sleep(_POLL)
        return time.monotonic() - running.since

    async def restart(self, name: str) -> None:
        """Kills a component's process and waits until the next one is ready."""
        running = self._running[name]
        os.kill(running.pid, signal.SIGKILL)
        await running.ended.wait()
        while self._running[name] is running or not await asyncio.to_thread(
            probe.is_ready, running.component.ready
        ):
            await asyncio.sleep(_POLL)

    def status(self) -> list[dict[str, Any]]:
        """Name, PID (in the cluster's PID namespace), seconds of running, restarts and resident bytes of every component."""
        return [
            {
                "name": name,
                "pid": r.pid,
                "seconds": round(time.monotonic() - r.since, 1),
                "restarts": r.restarts,
                "resident": _resident_bytes(r.pid),
            }
            for name, r in self._running.items()
        ]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one request of the control socket: a JSON object a line, {"do": "status"} or {"do": "restart", "name": NAME}."""
        request = json.loads(await reader.readline() or b"{}")
        if request.get("do") == "restart" and request.get("name") in self._running:
            await self.restart(request["name"])
        elif request.get("do") != "status":
            writer.write(
                json.dumps({"error": f"no such request; components are {', '.join(self._running)}"}).encode()
            )
            writer.close()
            return
        writer.write(json.dumps({"components": self.status()}).encode() + b"\n")
        writer.close()


def _ended_children() -> Iterator[int]:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid


def _kill_orphans(known: Iterable[int]) -> None:
    """Kills children that are no components: containers whose runtime has died, which a new runtime cannot adopt."""
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) in known:
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == "1":
                os.kill(int(directory.name), signal.SIGKILL)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _describe_failure(name: str, what: str) -> str:
    lines = INSIDE.log(name).read_text(errors="replace").splitlines()[-15:]
    return f"{name} {what}; its log (logs/{name}.log in the state directory) ends:\n" + "\n".join(lines)


def prepare_network() -> None:
    """Loopback with the first service addresses, and the bridge that pods join."""
    with Netlink() as netlink:
        netlink.set_up("lo")
        for address in (API_SERVICE_ADDRESS, DNS_ADDRESS):
            netlink.add_address("lo", IPv4Interface(f"{address}/32"))
        netlink.add_link(BRIDGE, "bridge")
        netlink.add_address(BRIDGE, IPv4Interface(f"{NODE_ADDRESS}/{POD_NETWORK.prefixlen}"))
        netlink.set_up(BRIDGE)


async def bring_up(supervisor: Supervisor, settings: Settings, progress: socket.socket) -> None:
    """Starts all components in the order of their needs, telling `up` about each."""

    async def start(component: Component) -> None:
        report(progress, component.name, seconds=await supervisor.start(component))

    async with asyncio.TaskGroup() as group:
        group.create_task(start(components.runtime()))
        await start(components.etcd(settings.tools))
        await start(components.api_server(settings.tools))
        for make in (components.controller_manager, components.scheduler, components.kubelet):
            group.create_task(start(make(settings.tools)))
        group.create_task(start(components.network_agent()))
    began = time.monotonic()
    while not await asyncio.to_thread(probe.node_is_ready):
        if time.monotonic() - began > _START_TIMEOUT:
            raise StartError(_describe_failure("kubelet", "did not make its node Ready"))
        await asyncio.sleep(_POLL)
    report(progress, "node", seconds=time.monotonic() - began)


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
    server = await asyncio.start_unix_server(supervisor.answer, INSIDE.control_socket)
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
        asyncio.run(supervise(settings, listener, progress))
    except* (StartError, OSError) as group:
        progress.setblocking(True)
        report(progress, "cluster", error="; ".join(_leaves(group)))
        sys.stderr.write("\n".join(_leaves(group)) + "\n")
        os._exit(1)
    # Not sys.exit: nothing is worth a tidy end here, and the kernel clears up the rest.
    os._exit(0)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[str]:
    leaves: list[str] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [str(error)]
    return leaves
