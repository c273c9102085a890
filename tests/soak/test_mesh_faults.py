"""Faults of a gang under load: no request fails, no token is lost or changed.

    MOE_SOAK_MESH_FAULTS=50 python -m pytest -m soak -s tests/soak/test_mesh_faults.py

Clients stream from a frontend in front of a gang and a replica of one process, which takes over when the
gang's leader is lost. Prints for each kind of fault the longest pause of any stream, and the seconds until
all ranks took part again.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

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

FAULTS = int(os.environ.get("MOE_SOAK_MESH_FAULTS", "52"))
CLIENTS, TOKENS = 4, 80
FRONTEND = (sys.executable, "-c", "from moe_frontend.main import main; main()")
REVISION = ("--revision", "one")


class Streams:
    """Clients that send the same requests again and again, and compare every answer with the first one."""

    def __init__(self, address, requests, expected):
        self.failed, self.wrong, self.whole, self.pause_s = [], [], 0, 0.0
        self._requests, self._expected, self._address = requests, expected, address
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

    def take_pause(self):
        """The longest pause of a stream since the last call."""
        with self._lock:
            pause, self.pause_s = self.pause_s, 0.0
        return pause

    def _run(self, number):
        with grpc.insecure_channel(self._address, options=transport.CLIENT_OPTIONS) as channel:
            stub = InferenceServiceStub(channel)
            while not self._stop.is_set():
                which = number % len(self._requests)
                number += 1
                self._once(stub, which)

    def _once(self, stub, which):
        tokens, last = [], time.monotonic()
        try:
            for response in stub.Generate(self._requests[which], timeout=300):
                now = time.monotonic()
                with self._lock:
                    self.pause_s = max(self.pause_s, now - last)
                last = now
                tokens += response.tokens
        except grpc.RpcError as error:
            self.failed.append(f"{error.code().name}: {error.details()}")
            return
        if tokens == self._expected[which]:
            self.whole += 1
        else:
            self.wrong.append((which, tokens))


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


def inject(gang, name, chance):
    """One fault; the name begins with the kind."""
    others = chance.sample(range(1, gang.ranks), 2)
    {
        "killed": lambda: gang.kill(others[0]),
        "hung": lambda: gang.hang(others[0]),
        "partitioned": lambda: gang.partition(others[0]),
        "leader killed": lambda: gang.kill(0),
        "leader hung": lambda: gang.hang(0),
        "two killed": lambda: [gang.kill(rank) for rank in others],
        "one killed, one hung": lambda: (gang.kill(others[0]), gang.hang(others[1])),
    }[name]()


KINDS = (
    *("killed", "hung", "partitioned", "killed", "hung", "partitioned"),
    *("leader killed", "leader hung", "two killed", "one killed, one hung"),
)


def run(tmp_path, shape, ranks, redundant, count, kinds):
    """What clients saw: by kind the pauses and the times until the gang was whole."""
    checkpoint = write_checkpoint(tmp_path / "model", eos_token_id=None)
    log = tmp_path / "ranks.log"
    wanted, chance, found = list(requests()), random.Random(1), {}
    flags = ("--redundant-experts", str(redundant), *REVISION, "--rebalance-threshold", "1")
    flags += (
        "--rebalance-interval",
        "0.5",
        "--prefill-tokens",
        "32",
        "--stall-timeout",
        "150",
        "--mesh-reforms",
        "1000",
    )
    with ExitStack() as stack:
        alone = stack.enter_context(Worker(checkpoint, "--device", "cpu", "--dtype", "float32", *REVISION))
        gang = Gang(checkpoint, shape, ranks, log, *flags)
        stack.callback(gang.close)
        alone.wait_ready()
        gang.wait(gang.is_whole)
        expected = answers(f"127.0.0.1:{alone.port}", wanted)
        address = frontend(stack, [gang.address, f"127.0.0.1:{alone.port}"])
        with Streams(address, wanted, expected) as streams:
            for number in range(count):
                time.sleep(chance.uniform(0.5, 2))
                streams.take_pause()
                kind, begin, before = kinds[number % len(kinds)], time.monotonic(), gang.formation()
                inject(gang, kind, chance)
                gang.wait(lambda before=before: gang.formation() not in {before, None})
                gang.wait(gang.is_whole)
                found.setdefault(kind, []).append((streams.take_pause(), time.monotonic() - begin))
            rebalances = gang.mesh().rebalances
    for kind, rows in found.items():
        pauses, wholes = zip(*rows, strict=True)
        print(f"\n{shape}, {redundant} redundant, {kind}: {len(rows)} times, longest pause "
              f"{max(pauses):.2f} s, whole after {max(wholes):.1f} s at most", end="")  # fmt: skip
    for which, tokens in streams.wrong:
        print(f"\nrequest {which}: {explained(checkpoint, wanted[which], expected[which], tokens)}", end="")
    print(f"\n{streams.whole} requests whole, {len(streams.failed)} failed, {len(streams.wrong)} wrong; "
          f"{rebalances} rebalancings since the last start of the leader")  # fmt: skip
    return streams


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("shape", "ranks", "redundant"), [("1x3", 3, 10), ("2x2", 4, 0)])
def test_no_token_is_lost_through_50_faults(tmp_path, shape, ranks, redundant):
    streams = run(tmp_path, shape, ranks, redundant, FAULTS // 2, KINDS)
    assert (streams.failed, streams.wrong) == ([], [])
    assert streams.whole > FAULTS
