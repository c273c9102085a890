"""What an honest client notices while others abuse the server: no error, and at most twice its latency.

Latencies alone and under attack are measured in turns, because a machine is not equally busy all the time.
`MOE_ABUSE` scales the attacks: 1,000,000 mutated messages and frames in `make soak`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
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
WINDOWS = 6
SAMPLES = 10
"""Honest requests in each window, alone and under attack, at least."""
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

    def run(self, until: threading.Event, most: int | None = None) -> None:
        """Sends `most` requests, or requests until the event is set."""
        with grpc.insecure_channel(self.address, options=transport.CLIENT_OPTIONS) as channel:
            stub = InferenceServiceStub(channel)
            while not until.is_set() and most != 0:
                self._once(stub)
                most = None if most is None else most - 1

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


def beside(served, what, abuse, windows=WINDOWS):
    """Calls `abuse` while an honest client runs, which must notice nothing; no process may end or grow.

    Gives what `abuse` returned each time; in a window it is called until the honest client has its samples.
    """
    never, told = threading.Event(), []
    alone = Honest(served.address)
    processes, memory = served.processes, [resident_mb(pid) for pid in served.processes]
    alone.run(never, SAMPLES)
    honest = Honest(served.address, alone.tokens)
    for _ in range(windows):
        wanted = len(honest.latencies_s) + SAMPLES
        with honest.beside():
            told.append(abuse())
            while len(honest.latencies_s) < wanted and not honest.errors:
                told.append(abuse())
        alone.run(never, SAMPLES)
    after = [resident_mb(pid) for pid in served.processes]
    alone_s, beside_s = (statistics.median(client.latencies_s) for client in (alone, honest))
    print(
        f"\n{what}, {len(told)} times: {len(honest.latencies_s)} honest requests, "
        f"{len(honest.errors)} errors, median {beside_s * 1e3:.0f} ms; "
        f"alone {len(alone.latencies_s)}, median {alone_s * 1e3:.0f} ms: {beside_s / alone_s:.2f}x; "
        f"MB {memory} -> {after}"
    )
    assert served.processes == processes
    assert alone.errors == honest.errors == []
    assert beside_s <= SLOWER * alone_s
    assert all(now < before + 300 for before, now in zip(memory, after, strict=True))
    return told


def resident_mb(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 2**20


def attacks(kind, address, count):
    """Sends a window's share of `count`, each time other ones; gives how often it was answered with what."""
    seeds, share = itertools.count(1), max(count // WINDOWS, 1)

    def attack():
        command = [sys.executable, "-m", "tests.soak.attack", kind, address, str(share), str(next(seeds))]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        told = Counter(json.loads(done.stdout))
        assert told["frames"] >= share if kind == "frames" else sum(told.values()) == share
        return told

    return attack


@pytest.fixture(params=["frontend", "worker"])
def target(served, request):
    """Who is attacked: a name and an address."""
    port = served.workers[0].port
    return request.param, served.address if request.param == "frontend" else f"127.0.0.1:{port}"


def test_mutated_messages(served, target):
    who, address = target
    count = round(COUNT * 0.35)
    told = beside(served, f"mutated messages to the {who}", attacks("protobufs", address, count))
    print(sum(told, Counter()))
    assert not sum(told, Counter()).keys() - ANSWERS


def test_random_frames(served, target):
    who, address = target
    count = round(COUNT * 0.15)
    told = beside(served, f"random HTTP/2 frames to the {who}", attacks("frames", address, count))
    print(sum(told, Counter()))


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
ROUNDS = 3


def test_oversize_requests(served, target):
    who, address = target
    options = (("grpc.max_send_message_length", -1),)
    with grpc.insecure_channel(address, options=options) as channel:
        stub = InferenceServiceStub(channel)

        def abuse():
            for _ in range(ROUNDS):
                for what, message in OVERSIZE.items():
                    assert refusal(stub, message).code() in TOO_LARGE, what

        beside(served, f"{ROUNDS} rounds of oversize requests to the {who}", abuse)


TOO_LARGE = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
"""The second is gRPC's own answer to a message over the server's limit."""


def refusal(stub, message):
    """The error that a request ends with."""
    if isinstance(message, pb.GenerateRequest):
        return refused(stub.Generate(message, timeout=120))
    with pytest.raises(grpc.RpcError) as raised:
        stub.Tokenize(message, timeout=120)
    return raised.value


def test_slow_readers(served, target):
    """Connections that open no window, with small requests on each, are given up and hold nothing."""
    who, address = target
    port = int(address.rpartition(":")[2])

    def abuse():
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(RawClient(port, window=0)) for _ in range(4)]
            for client in clients:
                for _ in range(70):
                    client.call(REQUEST)
            time.sleep(WRITE_TIMEOUT_S + 10)
            for worker in served.workers:
                worker.wait_load(running=0, queued=0)

    beside(served, f"280 unread streams of the {who}", abuse, windows=2)


def test_lying_workers(served):
    """A frontend ends every stream of workers that answer at random, and lives on."""
    liars = [process(sys.executable, "-m", "tests.soak.liar", str(seed)) for seed in range(2)]
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(liar).stdout.readline().strip() for liar in liars]
        started, address = stack.enter_context(frontend(*addresses))
        told = beside(served, "requests to lying workers", attacks("requests", address, round(COUNT * 0.02)))
        print(sum(told, Counter()))
        assert sum(told, Counter())["INTERNAL"]
        assert started.poll() is None
        assert resident_mb(started.pid) < 300
