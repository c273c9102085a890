"""Runs a mesh on this machine's CPUs and measures its steps; benchmarks/mesh.py makes figures of them.

    python -m benchmarks.mesh_running MODEL OPTIONS

is one rank that follows; OPTIONS is JSON for EngineOptions. Each rank is a process with one thread.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine.core import EngineCore
from moe_worker.engine.following import follow
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.engine.requests import Request
from moe_worker.mesh.rebalance.execute import Rebalancing
from moe_worker.mesh.runner import MeshRunner
from moe_worker.sampling.parameters import SamplingParameters

ROOT = Path(__file__).parents[1]
BATCH, PROMPT, CONTEXT, WARM_STEPS = 8, 64, 256, 8


class Steps(NamedTuple):
    """Means over decode steps of BATCH sequences.

    exchange_s: in exchanges of tokens, including the wait for slower ranks. sent_bytes: by rank 0 to others
    for their experts. forwarded_bytes, collected_bytes: hidden states to the next stage, and what the last
    one returns. bubbles: by rank the share of a step in which it uses no processor.
    """

    step_s: float
    exchange_s: float
    sent_bytes: float
    forwarded_bytes: float
    collected_bytes: float
    bubbles: tuple[float, ...]


class Moves(NamedTuple):
    """Seconds of decode steps while experts move and of those in between; how often they have moved."""

    moving: list[float]
    still: list[float]
    rebalancings: int


def measure(model: Path, mesh: str, steps: int, micro_batches: int | None = None) -> Steps:
    """Of `steps` steps after the prompts and a few others."""
    with running(model, mesh) as (loaded, options, followers):
        core = EngineCore(loaded, options, micro_batches=micro_batches)
        submit(core, tokens=steps + 4 * WARM_STEPS)
        while core.load.running < BATCH or core.load.queued:
            core.step()
        for _ in range(WARM_STEPS):
            core.step()
        pids = [os.getpid(), *(process.pid for process in followers)]
        before, used = moved(loaded), [processor_s(pid) for pid in pids]
        begin, produced = time.perf_counter(), 0
        while produced < steps * BATCH:
            produced += len(core.step())
        took = time.perf_counter() - begin
        busy = [processor_s(pid) - then for pid, then in zip(pids, used, strict=True)]
        sent, exchange_s, forwarded, collected = (
            (now - then) * BATCH / produced for now, then in zip(moved(loaded), before, strict=True)
        )
    bubbles = tuple(max(0.0, 1 - own / took) for own in busy)
    return Steps(took * BATCH / produced, exchange_s, sent, forwarded, collected, bubbles)


def measure_moves(model: Path, rounds: int, tokens: int, interval_s: float) -> Moves:
    """While experts move between two ranks; another text in each round changes their loads."""
    flags = {"redundant_experts": 2, "rebalance_interval": interval_s, "rebalance_threshold": 1.0}
    found = Moves([], [], 0)
    with running(model, "1x2", **flags) as (loaded, options, _):
        core, rebalancing = EngineCore(loaded, options), rebalancing_of(loaded)
        for number in range(1, rounds + 1):
            submit(core, tokens, number)
            while core.load.running < BATCH or core.load.queued:
                core.step()
            core.step()
            while core.load.running == BATCH:
                begin, before = time.perf_counter(), rebalancing.moving
                core.step()
                seconds = time.perf_counter() - begin
                (found.moving if before or rebalancing.moving else found.still).append(seconds)
            while not core.idle:
                core.step()
        found = found._replace(rebalancings=rebalancing.count)
    if not (found.moving and found.still):
        raise SystemExit(
            f"experts moved in {len(found.moving)} steps of {rounds} rounds; ask for more rounds"
        )
    return found


def submit(core: EngineCore, tokens: int, text: int = 1) -> None:
    """BATCH requests."""
    sampling = SamplingParameters(max_tokens=tokens, ignore_eos=True)
    for number in range(BATCH):
        prompt = tuple(5 + (number * 31 + place * text) % 200 for place in range(PROMPT))
        core.submit(Request(number, prompt, sampling, seed=0))


def rebalancing_of(loaded: LoadedModel) -> Rebalancing:
    """Of a leader."""
    if not isinstance(loaded.runner, MeshRunner) or loaded.runner.rebalancing is None:
        raise SystemExit("this mesh does not move experts")
    return loaded.runner.rebalancing


def moved(loaded: LoadedModel) -> tuple[float, float, float, float]:
    """Bytes sent and seconds in exchanges, bytes to the next stage and from the last, since the start."""
    runner = loaded.runner
    return (*runner.exchanged(), *runner.passed_on()) if isinstance(runner, MeshRunner) else (0, 0, 0, 0)


def processor_s(pid: int) -> float:
    """Seconds that a process has used of processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(
    model: Path, mesh: str, **more: Any
) -> Iterator[tuple[LoadedModel, EngineOptions, list[subprocess.Popen[bytes]]]]:
    """The model over a mesh, and the processes of its other ranks on this machine."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        leader = f"127.0.0.1:{server.getsockname()[1]}"
    given: dict[str, Any] = {
        "mesh": mesh,
        "mesh_leader": leader,
        "threads": 1,
        "context_length": CONTEXT,
        "device": "cpu",
    }
    given |= {"dtype": "float32", "max_batch_size": BATCH, **more}
    command = [sys.executable, "-m", "benchmarks.mesh_running", str(model.resolve())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    followers = [
        subprocess.Popen([*command, json.dumps(given | {"mesh_rank": rank})], cwd=ROOT, env=environment)
        for rank in range(1, MeshShape.parse(mesh).ranks)
    ]
    try:
        options = EngineOptions(**given)
        loaded = load(model, options, progress=False)
        yield loaded, options, followers
        if loaded.member is not None:
            loaded.member.close()
    finally:
        for process in followers:
            process.kill()
            process.wait()


if __name__ == "__main__":
    follow(Path(sys.argv[1]), EngineOptions(**json.loads(sys.argv[2])))
