"""A replica of several processes on this machine, each started again when it ends, as a kubelet would.

Every rank but the leader reaches its leader through a proxy, which can stop to forward anything.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from moe_api import transport
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.worker.mesh_ranks import free_address
from tests.worker.serving import COMMAND

SECRET = {"MOE_WORKER_MESH_SECRET": "of this gang", "OMP_NUM_THREADS": "1"}
LIVENESS_S = 5.0
"""After so long a kubelet kills a process that does not answer."""
DEADLINE_S = 180.0


class Proxy:
    """Forwards connections to `target`; while `cut`, it takes them and forwards nothing."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._whole = threading.Event()
        self._whole.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()

    def join(self) -> None:
        self._whole.set()

    def _accept(self) -> None:
        while True:
            inner, _ = self._server.accept()
            threading.Thread(target=self._connect, args=(inner,), daemon=True).start()

    def _connect(self, inner: socket.socket) -> None:
        self._whole.wait()
        try:
            outer = socket.create_connection(self._target)
        except OSError:
            inner.close()
            return
        for ends in ((inner, outer), (outer, inner)):
            threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                self._whole.wait()
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Gang:
    """`ranks` processes of `moe-worker serve`; rank 0 answers at `address`."""

    def __init__(self, checkpoint: Path, shape: str, ranks: int, log: Path, *flags: str) -> None:
        self.address, self.leader, self.ranks = free_address(), free_address(), ranks
        self._proxies = {rank: Proxy(self.leader) for rank in range(1, ranks)}
        common = ["serve", "--model", str(checkpoint), "--served-name", "tiny", "--threads", "1"]
        common += ["--mesh", shape, "--device", "cpu", "--dtype", "float32", *flags]
        self._commands = [
            [*COMMAND, *common, "--mesh-rank", str(rank), "--mesh-leader", self._door(rank)]
            for rank in range(ranks)
        ]
        self._commands[0] += ["--listen", self.address]
        self._path, self._log = log, log.open("ab")
        self._ended = False
        self._running = [self._start(rank) for rank in range(ranks)]
        self._restarts = threading.Thread(target=self._restart)
        self._restarts.start()

    def _door(self, rank: int) -> str:
        return self._proxies[rank].address if rank else self.leader

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._commands[rank], env=os.environ | SECRET, stdout=self._log, stderr=self._log
        )

    def _restart(self) -> None:
        while not self._ended:
            for rank, process in enumerate(self._running):
                if process.poll() is not None and not self._ended:
                    self._running[rank] = self._start(rank)
            time.sleep(0.1)

    def pid(self, rank: int) -> int:
        return self._running[rank].pid

    def _engine(self, rank: int) -> int:
        children = Path(f"/proc/{self.pid(rank)}/task/{self.pid(rank)}/children").read_text().split()
        return int(children[0])

    def terminate(self) -> None:
        """As the kubelet does when the replica is replaced: it drains, ends, and all its ranks start anew."""
        for process in list(self._running):
            process.terminate()

    def moves_experts(self) -> Callable[[], bool]:
        """Whether the leader has begun to move experts since this call."""
        offset = self._path.stat().st_size

        def begun() -> bool:
            with self._path.open("rb") as file:
                file.seek(offset)
                return b"moving experts of layer" in file.read()

        return begun

    def kill(self, rank: int) -> None:
        self._running[rank].kill()

    def hang(self, rank: int) -> None:
        """Until a kubelet would notice."""
        engine, edge = self._engine(rank), self._running[rank]
        os.kill(engine, signal.SIGSTOP)

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
            edge.kill()

        threading.Timer(LIVENESS_S, end).start()

    def partition(self, rank: int) -> None:
        """For as long."""
        self._proxies[rank].cut()
        threading.Timer(LIVENESS_S, self._proxies[rank].join).start()

    def load(self) -> worker_pb2.GetLoadResponse | None:
        """What the leader says; None where it says nothing."""
        with grpc.insecure_channel(self.address, options=transport.CLIENT_OPTIONS) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            try:
                return stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=2)
            except grpc.RpcError:
                return None

    def mesh(self) -> worker_pb2.Mesh | None:
        """Its part about the ranks."""
        load = self.load()
        return load.mesh if load is not None and load.HasField("mesh") else None

    def serves(self) -> bool:
        """Whether it has requests."""
        load = self.load()
        return load is not None and load.running + load.queued > 0

    def is_whole(self) -> bool:
        mesh = self.mesh()
        return mesh is not None and len(mesh.ready_ranks) == self.ranks

    def formation(self) -> tuple[int, int] | None:
        """Another one each time that the gang has met; None while its leader says nothing."""
        mesh = self.mesh()
        return None if mesh is None else (self.pid(0), mesh.epoch)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Raises AssertionError after DEADLINE_S."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"the gang is not well: {self.mesh()}"
            time.sleep(0.1)

    def close(self) -> None:
        self._ended = True
        self._restarts.join()
        for process in self._running:
            process.kill()
        for process in self._running:
            process.wait()
        self._log.close()
