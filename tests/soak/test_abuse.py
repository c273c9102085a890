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
from moe_api.writing import WRITE_TIMEOUT_S
from tests.http2 import RawClient
from tests.worker.serving import Worker, refused

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


@contextlib.contextmanager
def process(*command):
    """A process that is killed at the end of the block."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@contextlib.contextmanager
def frontend(*workers):
    """A frontend of these addresses: its process and its own address."""
    command = Path(sys.executable).with_name("moe-frontend"), "--listen", "127.0.0.1:0"
    with process(*command, "--static", ",".join(workers)) as started:
        port = next(line for line in started.stderr if "serving on" in line).rpartition(":")[2].strip()
        threading.Thread(target=lambda: [None for _ in started.stderr], daemon=True).start()
        yield started, f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def served():
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(MODEL)) for _ in range(2)]
        for worker in workers:
            worker.wait_ready()
        addresses = [f"127.0.0.1:{worker.port}" for worker in workers]
        started, address = stack.enter_context(frontend(*addresses))
        yield Served(address, workers, started)


@pytest.fixture(scope="module")
def baseline(served):
    """Latencies of the honest client alone, in seconds."""
    honest = Honest(served.address)
    honest.run(threading.Event(), BASELINE_S)
    assert honest.errors == []
    return honest


@contextlib.contextmanager
def nobody_is_hurt(served, baseline, what):
    """An honest client runs during the block and must notice nothing; no process may end or grow."""
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
    assert told["frames"] >= count


OVERSIZE = {
    "a prompt of 15,000,000 characters": pb.GenerateRequest(prompt="a" * 15_000_000),
    "3,000,000 prompt tokens": pb.GenerateRequest(prompt_tokens={"ids": [5] * 3_000_000}),
    "8,000,000 stop texts": pb.GenerateRequest(prompt="a", sampling={"stop": [""] * 8_000_000}),
    "1,200,000 biases": pb.GenerateRequest(
        prompt="a", sampling={"logit_bias": dict.fromkeys(range(1_200_000), 1.0)}
    ),
    "3,000,000 resumed tokens": pb.GenerateRequest(prompt="a", resume={"tokens": [5] * 3_000_000}),
    "a text of 15,000,000 characters": pb.TokenizeRequest(text="a" * 15_000_000),
}
ROUNDS = 20


def test_oversize_requests(served, baseline, target):
    who, address = target
    options = (("grpc.max_send_message_length", -1),)
    with (
        nobody_is_hurt(served, baseline, f"{ROUNDS} rounds of oversize requests to the {who}"),
        grpc.insecure_channel(address, options=options) as channel,
    ):
        stub = InferenceServiceStub(channel)
        for _ in range(ROUNDS):
            for what, message in OVERSIZE.items():
                assert refusal(stub, message).code() in TOO_LARGE, what


TOO_LARGE = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
"""The second is gRPC's own answer to a message over the server's limit."""


def refusal(stub, message):
    """The error that a request ends with."""
    if isinstance(message, pb.GenerateRequest):
        return refused(stub.Generate(message, timeout=120))
    with pytest.raises(grpc.RpcError) as raised:
        stub.Tokenize(message, timeout=120)
    return raised.value


def test_slow_readers(served, baseline, target):
    """Connections that open no window, with small requests on each, are given up and hold nothing."""
    who, address = target
    port = int(address.rpartition(":")[2])
    with (
        nobody_is_hurt(served, baseline, f"280 unread streams of the {who}"),
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(RawClient(port, window=0)) for _ in range(4)]
        for client in clients:
            for _ in range(70):
                client.call(REQUEST)
        time.sleep(WRITE_TIMEOUT_S + 10)
        for worker in served.workers:
            worker.wait_load(running=0, queued=0)


def test_lying_workers(served, baseline):
    """A frontend ends every stream of workers that answer at random, and lives on."""
    count = round(COUNT * 0.02)
    liars = [process(sys.executable, "-m", "tests.soak.liar", str(seed)) for seed in range(2)]
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(liar).stdout.readline().strip() for liar in liars]
        started, address = stack.enter_context(frontend(*addresses))
        with nobody_is_hurt(served, baseline, f"{count} requests to lying workers"):
            told = attack("requests", address, count)
        print(told)
        assert sum(told.values()) == count
        assert told["INTERNAL"]
        assert started.poll() is None
        assert resident_mb(started.pid) < 300
