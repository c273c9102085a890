"""What an honest client notices while others abuse the server: no error, and at most twice its latency.

`MOE_ABUSE` scales it: 1,000,000 mutated messages and frames in `make soak`.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from moe_api import transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.worker.serving import Worker

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/docs-moe"
COUNT = int(os.environ.get("MOE_ABUSE", "1000000"))
REQUEST = pb.GenerateRequest(prompt="The PostgreSQL query planner", sampling={"max_tokens": 8})
BASELINE_S = 20.0
SLOWER = 2.0
ANSWERS = {
    *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"),
    "UNAVAILABLE",  # resume names a revision that no replica has: the frontend waited for one
}


@dataclass
class Honest:
    """Sends one request after the other. tokens: of the first answer, which all others must repeat."""

    address: str
    tokens: list[int] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def run(self, until: threading.Event, most_s: float = 1e9) -> None:
        end = time.monotonic() + most_s
        with grpc.insecure_channel(self.address, options=transport.CLIENT_OPTIONS) as channel:
            stub = InferenceServiceStub(channel)
            while not until.is_set() and time.monotonic() < end:
                self._once(stub)

    def _once(self, stub: InferenceServiceStub) -> None:
        started = time.monotonic()
        try:
            tokens = [token for part in stub.Generate(REQUEST, timeout=120) for token in part.tokens]
        except grpc.RpcError as error:
            self.errors.append(f"{error.code().name}: {error.details()}")
            return
        self.latencies_s.append(time.monotonic() - started)
        self.tokens = self.tokens or tokens
        if tokens != self.tokens:
            self.errors.append(f"{tokens} instead of {self.tokens}")

    @contextlib.contextmanager
    def beside(self):
        """Runs in a thread for the time of the block."""
        stop = threading.Event()
        thread = threading.Thread(target=self.run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@dataclass
class Served:
    """A frontend with two workers on loopback."""

    address: str
    workers: list[Worker]
    frontend: subprocess.Popen[str]

    @property
    def processes(self) -> list[int]:
        return [
            self.frontend.pid,
            *(w.process.pid for w in self.workers),
            *(w.engine_pid() for w in self.workers),
        ]


@pytest.fixture(scope="module")
def served():
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(MODEL)) for _ in range(2)]
        for worker in workers:
            worker.wait_ready()
        static = ",".join(f"127.0.0.1:{worker.port}" for worker in workers)
        command = [
            Path(sys.executable).with_name("moe-frontend"),
            "--listen",
            "127.0.0.1:0",
            "--static",
            static,
        ]
        frontend = stack.enter_context(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="backslashreplace")
        )
        stack.callback(frontend.kill)
        lines = iter(frontend.stderr)
        port = next(line for line in lines if "serving on" in line).rpartition(":")[2].strip()
        drained = threading.Thread(target=lambda: [None for _ in lines], daemon=True)
        drained.start()
        yield Served(f"127.0.0.1:{port}", workers, frontend)


@pytest.fixture(scope="module")
def baseline(served):
    """Latencies of the honest client alone, in seconds."""
    honest = Honest(served.address)
    honest.run(threading.Event(), BASELINE_S)
    assert honest.errors == []
    return honest


@contextlib.contextmanager
def nobody_is_hurt(served, baseline, what):
    """An honest client runs beside the block and must notice nothing; no process may end or grow."""
    honest = Honest(served.address, baseline.tokens)
    processes, memory = served.processes, [resident_mb(pid) for pid in served.processes]
    with honest.beside():
        yield
    after = [resident_mb(pid) for pid in served.processes]
    alone, beside = (statistics.median(client.latencies_s) for client in (baseline, honest))
    print(
        f"\n{what}: {len(honest.latencies_s)} honest requests, {len(honest.errors)} errors, median "
        f"{beside * 1e3:.0f} ms, alone {alone * 1e3:.0f} ms, {beside / alone:.2f}x; MB {memory} -> {after}"
    )
    assert served.processes == processes
    assert honest.errors == []
    assert beside <= SLOWER * alone
    assert all(now < before + 300 for before, now in zip(memory, after, strict=True))


def resident_mb(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 2**20


def attack(kind, address, count, seed=1):
    """Runs an attacker to its end; what it was answered."""
    command = [sys.executable, "-m", "tests.soak.attack", kind, address, str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(params=["frontend", "worker"])
def target(served, request):
    """Who is attacked: a name and an address."""
    port = served.workers[0].port
    return request.param, served.address if request.param == "frontend" else f"127.0.0.1:{port}"


def test_mutated_messages(served, baseline, target):
    who, address = target
    count = round(COUNT * 0.35)
    with nobody_is_hurt(served, baseline, f"{count} mutated messages to the {who}"):
        told = attack("protobufs", address, count)
    print(told)
    assert sum(told.values()) == count
    assert not told.keys() - ANSWERS


def test_random_frames(served, baseline, target):
    who, address = target
    count = round(COUNT * 0.15)
    with nobody_is_hurt(served, baseline, f"{count} random HTTP/2 frames to the {who}"):
        told = attack("frames", address, count)
    print(told)
    assert told["connections"]
