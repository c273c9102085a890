"""Starts the cluster's components and keeps them running; a part of PID 1."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from localcluster.errors import StartError
from localcluster.layout import INSIDE
from localcluster.node import children, probe
from localcluster.node.components import Component
from moe_api import supervision

START_TIMEOUT = 90.0  # seconds until a component must be ready; the slowest takes 3 on an idle machine
_POLL = 0.05
_RESTART_DELAY = 1.0  # seconds; a component that cannot start must not use a whole core
_BACKOFF = supervision.Backoff(first_s=1.0, longest_s=10.0)
_LISTENER_FD = 3


def report(progress: socket.socket, component: str, *, seconds: float = 0.0, error: str = "") -> None:
    """Tells `up` that a component is ready, or that the start failed. `up` being gone is not this function's
    problem.
    """
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
    replaced: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Starts components and restarts them when they end."""

    def __init__(self, listener: socket.socket) -> None:
        # Away from the low numbers, so that the dup2 onto 3 in the child is never a no-op that keeps close-
        # on-exec.
        self._listener = fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, 100)
        self._running: dict[str, Running] = {}
        self._loops = supervision.Supervisor(backoff=_BACKOFF, expected=(OSError,))

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
        if before is not None:
            before.replaced.set()
        return running

    def reap(self) -> None:
        """Collects ended children: components, which start again, and orphans."""
        for pid in children.ended():
            running = next((r for r in self._running.values() if r.pid == pid), None)
            if running is not None:
                running.ended.set()
                children.kill_orphans({r.pid for r in self._running.values()})
                start = functools.partial(self._start_again, running.component)
                self._loops.start("component", start, running.component.name)

    async def _start_again(self, component: Component) -> None:
        """Raises OSError where there is no memory, or too many processes, for now."""
        await asyncio.sleep(_RESTART_DELAY)
        self.spawn(component)

    async def start(self, component: Component) -> float:
        """Starts a component and waits until it is ready; returns the seconds that took.

        Raises:
            StartError: it ended, or was not ready in time.
        """
        running = self.spawn(component)
        await self._until_ready(running)
        return time.monotonic() - running.since

    async def _until_ready(self, running: Running) -> None:
        name = running.component.name
        while not await asyncio.to_thread(probe.is_ready, running.component.ready):
            if running.ended.is_set():
                raise StartError(describe_failure(name, "ended while starting"))
            if time.monotonic() - running.since > START_TIMEOUT:
                raise StartError(describe_failure(name, f"was not ready within {START_TIMEOUT:.0f} s"))
            await asyncio.sleep(_POLL)

    async def restart(self, name: str) -> None:
        """Kills a component's process and waits until the next one is ready."""
        running = self._running[name]
        os.kill(running.pid, signal.SIGKILL)
        await running.replaced.wait()
        await self._until_ready(self._running[name])

    def pause(self, name: str, *, paused: bool) -> None:
        """Stops a component's process where it is, or lets it go on."""
        os.kill(self._running[name].pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def status(self) -> list[dict[str, Any]]:
        """Name, PID (in the cluster's PID namespace), seconds of running, restarts and resident bytes of
        every component.
        """
        return [
            {
                "name": name,
                "pid": r.pid,
                "seconds": round(time.monotonic() - r.since, 1),
                "restarts": r.restarts,
                "resident": children.resident_bytes(r.pid),
            }
            for name, r in self._running.items()
        ]

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answers {"do": "status"} and {"do": WHAT, "name": NAME} with the components, or an error.

        WHAT: restart, pause or resume.
        """
        match request:
            case {"do": "pause" | "resume" as what, "name": str(name)} if name in self._running:
                self.pause(name, paused=what == "pause")
            case {"do": "restart", "name": str(name)} if name in self._running:
                try:
                    await self.restart(name)
                except StartError as error:
                    return {"error": str(error)}
            case {"do": "status"}:
                pass
            case _:
                return {"error": f"no such request or component; components are {', '.join(self._running)}"}
        return {"components": self.status()}


def describe_failure(name: str, what: str) -> str:
    """What happened to a component, and the end of its log."""
    lines = INSIDE.log(name).read_text(errors="replace").splitlines()[-15:]
    return f"{name} {what}; its log (logs/{name}.log in the state directory) ends:\n" + "\n".join(lines)
