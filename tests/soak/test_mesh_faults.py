"""Faults of a gang under load: no request fails, no token is lost or changed.

    MOE_SOAK_MESH_FAULTS=56 python -m pytest -m soak -s tests/soak/test_mesh_faults.py

Clients stream from a frontend in front of a gang and a replica of one process, which takes over when the
gang's leader is lost. Each kind of fault strikes in each moment, and each rank in turn. Prints a line for
each fault, and by kind and by moment the pauses of streams and the seconds until all ranks took part again.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_api import transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from moe_worker.engine.offline import Engine
from tests.checkpoints import write_checkpoint
from tests.soak.gang import Gang
from tests.worker.mesh_ranks import free_address
from tests.worker.serving import Worker

FAULTS = int(os.environ.get("MOE_SOAK_MESH_FAULTS", "56"))
CLIENTS, TOKENS = 4, 80
MOMENT_S = 20.0
"""A moment is waited for no longer."""
FRONTEND = (sys.executable, "-c", "from moe_frontend.main import main; main()")
REVISION = ("--revision", "one")
FLAGS = (
    *REVISION, "--rebalance-threshold", "1", "--rebalance-interval", "0.5", "--prefill-tokens", "32",
    "--stall-timeout", "150", "--mesh-reforms", "1000",
)  # fmt: skip
KINDS: dict[str, Callable[[Gang, int, int], object]] = {
    "a rank killed": lambda gang, one, _: gang.kill(one),
    "a rank hung": lambda gang, one, _: gang.hang(one),
    "a rank cut off": lambda gang, one, _: gang.partition(one),
    "the leader killed": lambda gang, *_: gang.kill(0),
    "the leader hung": lambda gang, *_: gang.hang(0),
    "two ranks killed": lambda gang, *both: [gang.kill(rank) for rank in both],
    "one killed, one hung": lambda gang, one, other: (gang.kill(one), gang.hang(other)),
}
MOMENTS = ("prefill", "decode", "rebalance", "rollout")


class Streams:
    """Clients that send the same requests again and again, and compare every answer with the first one.

    prefill, decode: streams that wait for their first token, and for a later one.
    """

    def __init__(self, address, requests, expected):
        self.failed, self.wrong, self.whole, self.pause_s = [], [], 0, 0.0
        self._requests, self._expected, self._address = requests, expected, address
        self._received: dict[int, int] = {}
        self._heard = [0.0] * CLIENTS
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def counts(self):
        """Requests so far, those that failed, and those whose tokens were others."""
        return self.whole + len(self.failed) + len(self.wrong), len(self.failed), len(self.wrong)

    def in_phase(self, phase):
        """Streams that are in prefill, or in decode."""
        with self._lock:
            return sum((count == 0) == (phase == "prefill") for count in self._received.values())

    def all_heard_since(self, moment):
        """Whether each client has got a token, or begun a request, since then: no pause of before goes on."""
        with self._lock:
            return min(self._heard) > moment

    def take_pause(self):
        """The longest pause of a stream since the last call."""
        with self._lock:
            pause, self.pause_s = self.pause_s, 0.0
        return pause

    def _run(self, client):
        number = client
        with grpc.insecure_channel(self._address, options=transport.CLIENT_OPTIONS) as channel:
            stub = InferenceServiceStub(channel)
            while not self._stop.is_set():
                which = number % len(self._requests)
                number += 1
                self._once(stub, client, which)
                with self._lock:
                    del self._received[client]

    def _once(self, stub, client, which):
        tokens, last = [], time.monotonic()
        with self._lock:
            self._received[client], self._heard[client] = 0, last
        try:
            for response in stub.Generate(self._requests[which], timeout=300):
                now = time.monotonic()
                tokens += response.tokens
                with self._lock:
                    self.pause_s = max(self.pause_s, now - last)
                    self._received[client], self._heard[client] = len(tokens), now
                last = now
        except grpc.RpcError as error:
            self.failed.append(f"{error.code().name}: {error.details()}")
            return
        if tokens == self._expected[which]:
            self.whole += 1
        else:
            self.wrong.append((which, tokens))


class Outcome(NamedTuple):
    """Of one fault. requests: that ended from then until all ranks took part; pause_s: the longest."""

    kind: str
    moment: str
    requests: int
    failed: int
    wrong: int
    pause_s: float
    whole_s: float


def requests():
    """Greedy and seeded; short prompts, and long ones that are mostly prefill."""
    for number in range(6):
        long = number % 3 == 2
        prompt = pb.TokenIds(ids=[7 + (number * 31 + i) % 290 for i in range(160 if long else 5)])
        sampling = pb.SamplingParameters(
            max_tokens=20 if long else TOKENS, temperature=0.7 * (number % 2), seed=number, ignore_eos=True
        )
        yield pb.GenerateRequest(prompt_tokens=prompt, sampling=sampling)


def answers(address, wanted):
    with grpc.insecure_channel(address, options=transport.CLIENT_OPTIONS) as channel:
        stub = InferenceServiceStub(channel)
        return [[token for part in stub.Generate(each) for token in part.tokens] for each in wanted]


def frontend(stack, workers):
    address = free_address()
    command = [*FRONTEND, "--listen", address, "--static", ",".join(workers)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(60)
        for update in health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=""), timeout=60
        ):
            if update.status == health_pb2.HealthCheckResponse.SERVING:
                return address
    raise AssertionError("the frontend does not serve")


def explained(checkpoint, request, expected, tokens):
    """Where an answer differs from the expected one, and how near a tie one process finds that choice."""
    at = next((n for n, pair in enumerate(zip(expected, tokens, strict=False)) if len(set(pair)) > 1), None)
    if at is None or len(tokens) != len(expected):
        return f"{len(tokens)} tokens instead of {len(expected)}"
    engine = Engine(checkpoint, device="cpu", dtype="float32", threads=1)
    logits_V = engine.logits([*request.prompt_tokens.ids, *expected[:at]])[-1]
    gap = float(logits_V[expected[at]] - logits_V[tokens[at]])
    return f"token {at} is {tokens[at]} instead of {expected[at]}, whose logit is {gap:.2g} more"


def await_moment(gang, streams, moment):
    """Returns when it has come and the gang has requests, or after MOMENT_S. rollout: the gang has been told
    to end, and drains.
    """
    gang.wait(gang.serves)
    if moment == "rollout":
        gang.terminate()
    reached = {
        "prefill": lambda: streams.in_phase("prefill"),
        "decode": lambda: streams.in_phase("decode") == CLIENTS,
        "rebalance": gang.moves_experts(),
        "rollout": lambda: streams.in_phase("decode"),
    }[moment]
    ends = time.monotonic() + MOMENT_S
    while not (reached() and gang.serves()) and time.monotonic() < ends:
        time.sleep(0.002)


def strike(gang, streams, number):
    """The fault of this number; returns its outcome when all ranks take part again."""
    kind, moment = list(KINDS)[number % len(KINDS)], MOMENTS[number % len(MOMENTS)]
    others = gang.ranks - 1
    one, other = 1 + number % others, 1 + (number + 1) % others
    before, leader = gang.formation(), gang.pid(0)
    await_moment(gang, streams, moment)
    streams.take_pause()
    begin, counted = time.monotonic(), streams.counts
    KINDS[kind](gang, one, other)
    gang.wait(lambda: moment != "rollout" or gang.pid(0) != leader)
    gang.wait(lambda: gang.formation() not in {before, None})
    gang.wait(gang.is_whole)
    whole = time.monotonic()
    gang.wait(lambda: streams.all_heard_since(whole))
    sums = [now - then for now, then in zip(streams.counts, counted, strict=True)]
    return Outcome(kind, moment, *sums, streams.take_pause(), whole - begin)


def table(title: str, groups: Iterable[tuple[str, list[Outcome]]]) -> str:
    """One row for each group, in Markdown."""
    columns = [title, "faults", "requests", "failed", "tokens changed"]
    columns += ["longest pause, median", "max", "all ranks back, median", "max"]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for name, rows in groups:
        pauses, wholes = [row.pause_s for row in rows], [row.whole_s for row in rows]
        times = [statistics.median(pauses), max(pauses), statistics.median(wholes), max(wholes)]
        sums = [len(rows), *(sum(each) for each in zip(*(row[2:5] for row in rows), strict=True))]
        lines.append(
            f"| {name} | {' | '.join(map(str, sums))} | " + " | ".join(f"{s:.1f} s" for s in times) + " |"
        )
    return "\n".join(lines)


def run(tmp_path, shape, ranks, redundant, count):
    """What clients saw."""
    checkpoint = write_checkpoint(tmp_path / "model", eos_token_id=None)
    wanted, found = list(requests()), []
    with ExitStack() as stack:
        alone = stack.enter_context(Worker(checkpoint, "--device", "cpu", "--dtype", "float32", *REVISION))
        gang = Gang(
            checkpoint, shape, ranks, tmp_path / "ranks.log", *FLAGS, "--redundant-experts", str(redundant)
        )
        stack.callback(gang.close)
        alone.wait_ready()
        gang.wait(gang.is_whole)
        expected = answers(f"127.0.0.1:{alone.port}", wanted)
        address = frontend(stack, [gang.address, f"127.0.0.1:{alone.port}"])
        with Streams(address, wanted, expected) as streams:
            for number in range(count):
                found.append(strike(gang, streams, number))
                print(f"\n{shape} {number + 1}/{count}: {found[-1]}", end="", flush=True)
    for title, key in (("kind", 0), ("moment", 1)):
        names = dict.fromkeys(row[key] for row in found)
        groups = ((name, [row for row in found if row[key] == name]) for name in names)
        print(f"\n\n{table(f'{shape}, {redundant} redundant, by {title}', groups)}")
    for which, tokens in streams.wrong:
        print(f"request {which}: {explained(checkpoint, wanted[which], expected[which], tokens)}")
    print(f"{shape}: {streams.counts[0]} requests, {len(streams.failed)} failed, {len(streams.wrong)} wrong")
    return streams


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("shape", "ranks", "redundant"), [("1x3", 3, 10), ("2x2", 4, 0)])
def test_no_token_is_lost_through_50_faults(tmp_path, shape, ranks, redundant):
    streams = run(tmp_path, shape, ranks, redundant, FAULTS // 2)
    assert (streams.failed, streams.wrong) == ([], [])
    assert streams.whole > FAULTS // 2
