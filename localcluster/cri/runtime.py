"""The process runtime's state and actions: sandboxes and containers, apart from how they are asked for.

Everything runs on one event loop, so that no locks are needed. State is in memory only: when the runtime
ends, the supervisor kills its containers, and the kubelet recreates them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from localcluster import images
from localcluster.cri import process, sandbox
from localcluster.cri.enter import CANNOT_START, Spec, Volume
from localcluster.cri.logs import LogFile, Pump
from localcluster.errors import LocalClusterError
from localcluster.images import Image
from moe_api.supervision import Supervisor

_log = logging.getLogger(__name__)


class NoSuchObjectError(LocalClusterError):
    """There is no sandbox or container with that id."""


class CannotStartError(LocalClusterError):
    """A container's process could not be started; the message says why."""


@dataclass(frozen=True)
class SandboxConfig:
    """What the kubelet asks of a sandbox.

    Attributes:
        hostname: the pod's host name.
        host_network: whether it lives in the node's network.
        log_directory: where the containers' logs go; empty for none.
        resolver: the content of its /etc/resolv.conf.
    """

    hostname: str
    host_network: bool
    log_directory: str
    resolver: str


@dataclass
class Sandbox:
    """A pod's namespaces."""

    id: str
    config: SandboxConfig
    home: Path
    namespaces: sandbox.Namespaces
    created: int
    ready: bool = True


@dataclass(frozen=True)
class ContainerConfig:
    """What the kubelet asks of a container."""

    image: Image
    command: tuple[str, ...]
    environment: dict[str, str]
    directory: str
    volumes: tuple[Volume, ...]
    read_only: bool
    log_path: str
    stop_signal: signal.Signals = signal.SIGTERM


@dataclass
class Container:
    """A container and what became of it; times in nanoseconds since the epoch, 0 for not yet."""

    id: str
    sandbox: Sandbox
    config: ContainerConfig
    home: Path
    created: int
    started: int = 0
    finished: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    pid: int = 0
    log: LogFile | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self.started > 0 and self.finished == 0


class Runtime:
    """All sandboxes and containers of the node."""

    def __init__(
        self, directory: Path, images_file: Path, hidden: Sequence[str], needed: Sequence[str]
    ) -> None:
        """`hidden` directories of the machine are empty in containers; `needed` ones are always there."""
        self.sandboxes: dict[str, Sandbox] = {}
        self.containers: dict[str, Container] = {}
        self._directory, self._images_file = directory, images_file
        self._hidden, self._needed = tuple(hidden), tuple(needed)
        self._addresses = sandbox.AddressPool()
        self._supervisor = Supervisor()
        # Files of an earlier runtime belong to containers that died with it.
        shutil.rmtree(directory, ignore_errors=True)

    def images(self) -> dict[str, Image]:
        """The images known now."""
        return images.read(self._images_file)

    def get_sandbox(self, sandbox_id: str) -> Sandbox:
        """A sandbox by id; raises NoSuchObjectError."""
        if sandbox_id not in self.sandboxes:
            raise NoSuchObjectError(f"no pod sandbox {sandbox_id}")
        return self.sandboxes[sandbox_id]

    def get_container(self, container_id: str) -> Container:
        """A container by id; raises NoSuchObjectError."""
        if container_id not in self.containers:
            raise NoSuchObjectError(f"no container {container_id}")
        return self.containers[container_id]

    def run_sandbox(self, config: SandboxConfig) -> Sandbox:
        """Makes a pod's namespaces and files; raises OSError."""
        name = secrets.token_hex(32)
        home = self._directory / name
        home.mkdir(parents=True)
        (home / "resolv.conf").write_text(config.resolver)
        (home / "hostname").write_text(config.hostname + "\n")
        # More than one address for a name in /etc/hosts is what headless services mean by it.
        (home / "host.conf").write_text("multi on\n")
        used = [s.namespaces.address for s in self.sandboxes.values() if s.ready]
        address = None if config.host_network else self._addresses.take(used)
        made = Sandbox(name, config, home, sandbox.make(name, config.hostname, address), time.time_ns())
        self.sandboxes[name] = made
        return made

    async def stop_sandbox(self, target: Sandbox) -> None:
        """Kills a pod's containers and takes it off the network."""
        await asyncio.gather(*(self.stop(c, 0) for c in self.containers_of(target)))
        if target.ready:
            target.ready = False
            target.namespaces.close()

    async def remove_sandbox(self, target: Sandbox) -> None:
        """Stops a pod, removes its containers and forgets it."""
        await self.stop_sandbox(target)
        for container in self.containers_of(target):
            await self.remove(container)
        shutil.rmtree(target.home, ignore_errors=True)
        self.sandboxes.pop(target.id, None)

    def containers_of(self, owner: Sandbox) -> list[Container]:
        """The containers in a sandbox."""
        return [c for c in self.containers.values() if c.sandbox is owner]

    def create(self, owner: Sandbox, config: ContainerConfig) -> Container:
        """Makes a container's directories; raises CannotStartError where it could never start."""
        for volume in config.volumes:
            if not Path(volume.source).exists():
                raise CannotStartError(
                    f"volume for {volume.target}: {volume.source} does not exist on the node"
                )
        if not config.command:
            raise CannotStartError(
                f"no command: image {config.image.name} has no entrypoint, so the pod must set `command`"
            )
        name = secrets.token_hex(32)
        home = self._directory / name
        for part in ("root", "layers", "tmp"):
            (home / part).mkdir(parents=True)
        (home / "tmp").chmod(0o1777)
        made = Container(name, owner, config, home, time.time_ns())
        self.containers[name] = made
        return made

    def _spec(self, container: Container) -> Spec:
        config, pod = container.config, container.sandbox
        files = [
            Volume(str(pod.home / f), f"/etc/{f}", read_only=False)
            for f in ("resolv.conf", "hostname", "host.conf")
        ]
        shared = [Volume(path, path, read_only=True) for path in self._needed]
        return Spec(
            command=list(config.command),
            environment=self.environment(container),
            directory=config.directory or "/",
            namespaces=list(pod.namespaces.descriptors),
            home=str(container.home),
            volumes=tuple(outer_first((*shared, *files, *config.volumes))),
            hidden=self._hidden,
            read_only=config.read_only,
        )

    def environment(self, container: Container) -> dict[str, str]:
        """The variables of a container's process: the image's, the pod's name, the pod spec's."""
        config = container.config
        return {**config.image.variables, "HOSTNAME": container.sandbox.config.hostname, **config.environment}

    async def start(self, container: Container) -> None:
        """Starts a container's process; raises CannotStartError, and shows the same in the container's
        status.
        """
        (output, stdout), (errors, stderr) = os.pipe(), os.pipe()
        container.log = LogFile(Path(container.sandbox.config.log_directory) / container.config.log_path)
        pumps = [Pump(output, "stdout", container.log), Pump(errors, "stderr", container.log)]
        try:
            started = await process.start(self._spec(container), stdout, stderr)
        finally:
            os.close(stdout)
            os.close(stderr)
        container.pid, container.started = started.pid, time.time_ns()
        if started.pid:
            self._supervisor.start("container", lambda: self._watch(container, pumps), container.id[:12])
        if started.error:
            if started.pid:
                await container.ended.wait()
            self._end(container, pumps, CANNOT_START, "StartError", started.error)
            raise CannotStartError(started.error)

    async def _watch(self, container: Container, pumps: Iterable[Pump]) -> None:
        code = await process.exit_code(container.pid)
        self._end(container, pumps, code, "Completed" if code == 0 else "Error", "")

    def _end(self, container: Container, pumps: Iterable[Pump], code: int, reason: str, message: str) -> None:
        """Reads the pipes first, so that the last output is in the log when the container's end becomes
        visible.

        The container ends even if its last output cannot be written (a full disk); otherwise nobody could
        stop or remove it.
        """
        closing = [] if container.log is None else [container.log.close]
        for finish in (*(pump.finish for pump in pumps), *closing):
            try:
                finish()
            except OSError as error:
                _log.warning("the log of container %s is incomplete: %s", container.id[:12], error)
        container.log = None
        container.exit_code, container.reason, container.message = code, reason, message
        container.finished = container.finished or time.time_ns()
        container.ended.set()

    async def stop(self, container: Container, grace: float) -> None:
        """Asks a container to end, and after `grace` seconds kills it. Returns when it has ended."""
        if not container.running:
            return
        if grace > 0:
            process.send(container.pid, container.config.stop_signal)
            try:
                await asyncio.wait_for(container.ended.wait(), grace)
            except TimeoutError:
                container.message = f"killed after {grace:.0f} s of grace"
        if container.running:
            # The command is PID 1 of the container's PID namespace: its end ends all that it has started.
            process.send(container.pid, signal.SIGKILL)
            await container.ended.wait()

    async def remove(self, container: Container) -> None:
        """Kills a container and forgets it."""
        await self.stop(container, 0)
        shutil.rmtree(container.home, ignore_errors=True)
        self.containers.pop(container.id, None)


def outer_first(volumes: Iterable[Volume]) -> list[Volume]:
    """Sorted so that no volume covers one inside it; of two at the same path, the later one wins."""
    return sorted(volumes, key=lambda volume: Path(volume.target).parts)
