"""The operator as a process of its own, outside of the cluster, and a way to trouble its connection."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml


class Operator:
    """The operator's process. settings: of `moe_operator.settings.Settings`, as text."""

    def __init__(self, directory: Path, kubeconfig: Path, checkout: Path, **settings: str) -> None:
        self._log = (directory / "operator.log").open("ab")
        sources = os.pathsep.join(str(checkout / part) for part in ("operator", "protos"))
        settings = {"model_roots": "/", **settings}
        variables = {f"MOE_OPERATOR_{name.upper()}": value for name, value in settings.items()}
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": sources, **variables}
        command = [sys.executable, "-m", "moe_operator", "--quiet"]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, env=environment, cwd=directory, stdout=self._log, stderr=self._log
        )

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self, field: str) -> float:
        """VmRSS, or VmHWM for the highest."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    def idle_after(self, limit: float) -> float:
        """Seconds from the start until it used less than 3 % of a core for 3 s; infinite beyond the limit."""
        quiet_since, before = None, self.cpu_seconds()
        while time.monotonic() - self.started < limit:
            time.sleep(1)
            used, before = self.cpu_seconds() - before, self.cpu_seconds()
            quiet_since = None if used > 0.03 else quiet_since or time.monotonic() - 1
            if quiet_since is not None and time.monotonic() - quiet_since >= 3:
                return quiet_since - self.started
        return math.inf

    def kill(self) -> None:
        """Ends it without any goodbye."""
        self.process.kill()
        self.process.wait()
        self._log.close()

    def stop(self) -> None:
        """Ends it as a kubelet would."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(25)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def kubeconfig(directory: Path, port: int, token: str) -> Path:
    """A file by which a process finds the API server of this directory, on a port of this machine."""
    authority = str(directory / "pki/apiserver.crt")
    server = {"server": f"https://127.0.0.1:{port}", "certificate-authority": authority}
    content: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": server}],
        "users": [{"name": "me", "user": {"token": token}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    }
    path = directory / f"kubeconfig-{port}"
    path.write_text(yaml.safe_dump(content))
    return path


class Proxy:
    """Passes connections on to a port of this machine: slowly, or not at all, when told so."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port: int = self._listener.getsockname()[1]
        self.delay_s = 0.0
        """How long every piece of an answer takes."""
        self.away = False
        """New connections are closed at once."""
        threading.Thread(target=self._accept, daemon=True).start()

    def drop(self) -> None:
        """Breaks all connections."""
        with self._lock:
            broken, self._open = self._open, set()
        for one in broken:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends it."""
        self._listener.close()
        self.drop()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.away:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._open |= {client, server}
                for source, sink, slow in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass, args=(source, sink, slow), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.delay_s if slow else 0)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
