"""A local cluster as an object: start it, use it, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from localcluster import build, processes
from localcluster.errors import (
    AlreadyRunningError,
    CommandError,
    LocalClusterError,
    NotRunningError,
    StartError,
)
from localcluster.forward import connect_unix
from localcluster.layout import CHECKOUT, TOOLS, Layout, needed_paths
from localcluster.progress import Step
from localcluster.settings import STAY, STAY_WITH_PARENT, Mount, Settings

DEFAULT_DIRECTORY = CHECKOUT / ".local"
DEFAULT_MOUNTS = (Mount(CHECKOUT / "examples", Path("/mnt/models")),)
_KILL_TIMEOUT = 20.0  # seconds; the kernel needs milliseconds, more only when the machine is swapping


@dataclass(frozen=True)
class Ready:
    """A part of the cluster that has become ready, and how long that took from its own start."""

    component: str
    seconds: float


class Cluster:
    """The local cluster in one state directory. Several can run side by side, each in its own directory."""

    def __init__(
        self,
        directory: Path | str = DEFAULT_DIRECTORY,
        *,
        mounts: Sequence[Mount] = DEFAULT_MOUNTS,
        extra_tools: Sequence[str] = (),
        api_port: int = 0,
        audit: bool = False,
        replacements: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        """Stores the settings; creates nothing yet.

        Args:
            directory: the state directory, made by `up`.
            mounts: directories of the machine to show on the node.
            extra_tools: further names that `localcluster.build` knows, to build and link in addition to
            Kubernetes.
            api_port: the API server's port on 127.0.0.1; 0 takes a free one.
            audit: log every request to the API server, with its user, in `audit_log`.
            replacements: executables to use instead of the built ones, by tool name.
        """
        self._layout = Layout(Path(directory).absolute())
        self._mounts, self._extra_tools, self._api_port = tuple(mounts), tuple(extra_tools), api_port
        self._audit = audit
        self._replacements = dict(replacements)
        self._tie = ExitStack()

    @property
    def directory(self) -> Path:
        """The state directory."""
        return self._layout.root

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self._layout.kubeconfig

    @property
    def audit_log(self) -> Path:
        """With `audit`: one JSON object a line (audit.k8s.io/v1 Event) for each request."""
        return self._layout.audit_log

    def is_running(self) -> bool:
        """Whether the cluster's processes run."""
        record = processes.read_record(self._layout.record)
        return record is not None and processes.is_running(record.init)

    def up(
        self,
        on_ready: Callable[[Ready], None] = lambda _: None,
        on_build: Callable[[Step], None] = lambda _: None,
        *,
        detached: bool = True,
    ) -> None:
        """Starts the cluster and returns when its node is Ready. After an error nothing is left behind.

        Args:
            on_ready: told of every component that has become ready.
            on_build: told what the build does, if one is needed.
            detached: whether the cluster outlives this process; otherwise it ends with this process, even if
            that is killed.

        Raises:
            AlreadyRunningError: it runs, or someone else is just starting or stopping it.
            BuildError: the executables could not be built.
            NamespacesForbiddenError: this machine allows no namespaces.
            StartError: a component did not become ready.
        """
        with processes.locked(self._layout.lock):
            if self.is_running():
                raise AlreadyRunningError(
                    f"the cluster in {self.directory} runs already; "
                    "stop it with `python -m localcluster down`"
                )
            self._remove()
            try:
                self._prepare(on_build)
                self._start(on_ready, detached=detached)
            except BaseException:
                self._stop()
                raise

    def _prepare(self, on_build: Callable[[Step], None]) -> None:
        names = list(dict.fromkeys((*TOOLS, *self._extra_tools)))
        tools = {**build.ensure(names, on_build), **self._replacements}
        layout = self._layout
        for directory in (layout.bin, layout.logs, layout.run, layout.node):
            directory.mkdir(parents=True, exist_ok=True)
        for log in layout.logs.glob("*.log"):
            log.unlink()
        for name, path in tools.items():
            (layout.bin / name).unlink(missing_ok=True)
            (layout.bin / name).symlink_to(path)
        settings = Settings(
            state=layout.root,
            mounts=tuple(m for m in self._mounts if m.host.is_dir()),
            tools=tools,
            needed=tuple(needed_paths()),
            api_port=self._api_port,
            audit=self._audit,
        )
        settings.write(layout.settings)

    def _start(self, on_ready: Callable[[Ready], None], *, detached: bool) -> None:
        """Starts the launcher and reads its messages. Until it is told to stay, the cluster ends with this
        process.
        """
        with ExitStack() as stack:
            ours = self._launch(stack)
            for message in _messages(ours):
                if message["error"]:
                    raise StartError(message["error"])
                on_ready(Ready(message["component"], message["seconds"]))
                if message["component"] == "node":
                    ours.sendall(STAY if detached else STAY_WITH_PARENT)
                    self._tie = ExitStack() if detached else stack.pop_all()
                    return
        last = self._layout.log("supervisor").read_text(errors="replace").strip().splitlines()[-1:]
        raise StartError(f"the cluster ended while starting: {''.join(last) or 'it was killed'}")

    def _launch(self, stack: ExitStack) -> socket.socket:
        """Starts the launcher; returns our end of the socket whose other end PID 1 will hold."""
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs, self._layout.log("supervisor").open("wb") as log:
            arguments = (str(self.directory), str(theirs.fileno()))
            launcher = subprocess.Popen(
                [sys.executable, "-m", "localcluster.node.launcher", *arguments],
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        stack.callback(launcher.wait)  # it ends as soon as it has forked PID 1
        return ours

    def down(self) -> bool:
        """Stops the cluster and deletes its state, except logs. Returns whether something ran; it is no error
        if nothing did.

        Raises:
            AlreadyRunningError: someone else is just starting or stopping it.
            LocalClusterError: a process did not end.
        """
        with processes.locked(self._layout.lock):
            return self._stop()

    def _stop(self) -> bool:
        record = processes.read_record(self._layout.record)
        ran = record is not None and processes.is_running(record.init)
        if record is not None and not processes.kill(record.init, _KILL_TIMEOUT):
            raise LocalClusterError(
                f"process {record.init.pid} did not end within {_KILL_TIMEOUT:.0f} s; try `down` again"
            )
        self._tie.close()
        self._remove()
        return ran

    def _remove(self) -> None:
        for directory in (self._layout.node, self._layout.run, self._layout.bin):
            _remove_tree(directory)
        self._layout.kubeconfig.unlink(missing_ok=True)

    def kubectl(self, *arguments: str, input: str | None = None, timeout: float = 120.0) -> str:  # noqa: A002 - as subprocess.run
        """Runs kubectl as administrator and returns its standard output.

        Raises:
            CommandError: it failed; the message holds its standard error.
            NotRunningError: no cluster runs here.
        """
        if not self.kubeconfig.exists():
            raise self._not_running()
        command = [str(self._layout.bin / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        result = subprocess.run(
            command, input=input, capture_output=True, text=True, timeout=timeout, check=False
        )
        if result.returncode:
            shown = " ".join(arguments)
            raise CommandError(
                f"kubectl {shown} ended with code {result.returncode}: {result.stderr.strip()}"
            )
        return result.stdout

    def status(self) -> list[dict[str, Any]]:
        """The components: name, pid, seconds, restarts, resident (bytes). Raises NotRunningError."""
        return self._ask({"do": "status"})

    def restart(self, component: str) -> None:
        """Kills a component's process and waits until its successor is ready. Raises NotRunningError."""
        self._ask({"do": "restart", "name": component})

    @contextlib.contextmanager
    def paused(self, component: str) -> Iterator[None]:
        """Stops a component's process for the time of a block, as if it hung. Raises NotRunningError."""
        self._ask({"do": "pause", "name": component})
        try:
            yield
        finally:
            self._ask({"do": "resume", "name": component})

    def _not_running(self) -> NotRunningError:
        return NotRunningError(
            f"no cluster runs in {self.directory}; start one with `python -m localcluster up`"
        )

    def _ask(self, request: dict[str, str]) -> list[dict[str, Any]]:
        try:
            with connect_unix(self._layout.control_socket) as connection:
                connection.sendall(json.dumps(request).encode() + b"\n")
                answer = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
        except (FileNotFoundError, ConnectionRefusedError):
            raise self._not_running() from None
        if "error" in answer:
            raise LocalClusterError(answer["error"])
        components: list[dict[str, Any]] = answer["components"]
        return components


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    with connection.makefile("r") as lines:
        for line in lines:
            yield json.loads(line)


def _remove_tree(directory: Path) -> None:
    """Deletes a directory tree, also where permissions forbid it (the kernel's overlay and containers leave
    such).
    """
    for path, _, _ in os.walk(directory):
        with contextlib.suppress(PermissionError):
            Path(path).chmod(stat.S_IRWXU)
    if directory.exists():
        shutil.rmtree(directory)
