"""Cost of a mesh on one machine's CPUs: time of a decode step, and what the exchange of tokens takes of it.

    python -m benchmarks.mesh [--model examples/docs-moe] [--meshes 1x1,1x2,2x1,2x2] [--json]

Each rank is a process with one thread, so more ranks than cores share them. A step is one token of every
sequence. Its baseline is the same model in one process (mesh 1x1), measured in the same run; that of the
exchange is the step, and the rest of the step is the computation. Bytes are those that rank 0 sends to
others. A pipeline is measured with one micro-batch, too. The bubble of a rank is the share of a step in
which its process uses no processor, which includes waiting for a busy one. With --rebalance, the steps while
experts move are compared with those in between. Simulated lines are of benchmarks/mesh_model.py.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.mesh_model import simulated_rows
from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.engine.requests import Request
from moe_worker.mesh.runner import MeshRunner
from moe_worker.sampling.parameters import SamplingParameters

BATCH, STEPS, PROMPT, ROUNDS = 8, 100, 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "examples" / "docs-moe")
    parser.add_argument("--meshes", default="1x1,1x2,2x1,2x2")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rebalance", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    baseline = None
    for mesh in arguments.meshes.split(","):
        found = measure(arguments.model, mesh)
        baseline = baseline or found["step_ms"]
        for row in rows(mesh, found, baseline):
            show(row, arguments.json)
        if MeshShape.parse(mesh).pipeline > 1:
            for row in pipeline_rows(mesh, found, measure(arguments.model, mesh, micro_batches=1)):
                show(row, arguments.json)
    if arguments.rebalance:
        for row in rebalancing_rows(*measure_rebalancing(arguments.model)):
            show(row, arguments.json)
    for row in simulated_rows():
        show(row, arguments.json)


def show(row: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(row) if as_json else f"{row['what']}: {row['ours']:.4g} {row['unit']}", flush=True)


def rows(mesh: str, found: dict[str, Any], baseline: float) -> list[dict[str, Any]]:
    """One object a figure."""
    step = found["step_ms"]
    common = {"device": "cpu", "simulated": False}
    return [
        {"what": f"decode step of {BATCH} sequences, mesh {mesh}", "ours": step, "baseline": baseline,
         "ratio": step / baseline, "unit": "ms", **common},
        {"what": f"exchange of tokens in a step, mesh {mesh}", "ours": found["exchange_ms"],
         "baseline": step, "ratio": found["exchange_ms"] / step, "unit": "ms", **common},
        {"what": f"bytes to other ranks in a step, mesh {mesh}", "ours": found["bytes"], "baseline": None,
         "ratio": None, "unit": "bytes", **common},
    ]  # fmt: skip


def pipeline_rows(mesh: str, found: dict[str, Any], whole: dict[str, Any]) -> list[dict[str, Any]]:
    """One object a figure; the baseline is one micro-batch."""
    common = {"device": "cpu", "simulated": False}
    what = f"micro-batches for each of the stages, mesh {mesh}"
    bubbles = [
        {"what": f"bubble of rank {rank}, {what}", "ours": ours, "baseline": before,
         "ratio": ours / before if before else None, "unit": "share of a step", **common}
        for rank, (ours, before) in enumerate(zip(found["bubbles"], whole["bubbles"], strict=True))
    ]  # fmt: skip
    ours, before = found["step_ms"], whole["step_ms"]
    step = {"what": f"decode step of {BATCH} sequences, {what}", "ours": ours, "baseline": before,
            "ratio": ours / before, "unit": "ms", **common}  # fmt: skip
    return [step, *bubbles]


def measure(model: Path, mesh: str, micro_batches: int | None = None) -> dict[str, Any]:
    """Means over steps of BATCH sequences; the exchange includes the wait for slower ranks."""
    with running(model, mesh) as (loaded, options, others):
        core = EngineCore(loaded, options, micro_batches=micro_batches)
        sampling = SamplingParameters(max_tokens=STEPS + 20, ignore_eos=True)
        for number in range(BATCH):
            prompt = tuple(5 + (number * 31 + i) % 200 for i in range(PROMPT))
            core.submit(Request(number, prompt, sampling, seed=0))
        while core.load.running < BATCH:
            core.step()
        for _ in range(8):
            core.step()
        pids = [os.getpid(), *(process.pid for process in others)]
        before, used = exchanged(loaded), [processor_s(pid) for pid in pids]
        begin, produced = time.perf_counter(), 0
        while produced < STEPS * BATCH:
            produced += len(core.step())
        took = time.perf_counter() - begin
        busy = [processor_s(pid) - then for pid, then in zip(pids, used, strict=True)]
        steps = produced / BATCH
        nbytes, seconds = ((now - then) / steps for now, then in zip(exchanged(loaded), before, strict=True))
    return {
        "step_ms": took / steps * 1e3, "exchange_ms": seconds * 1e3, "bytes": nbytes,
        "bubbles": [max(0.0, 1 - own / took) for own in busy],
    }  # fmt: skip


def processor_s(pid: int) -> float:
    """Seconds that a process has used of processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rebalancing_rows(moving: list[float], still: list[float], moves: int) -> list[dict[str, Any]]:
    """One object a figure: seconds of steps while experts move, and in between."""
    what = (
        f"step of {BATCH} sequences while experts move, mesh 1x2, {moves} rebalancings, {len(moving)} steps"
    )
    normal = statistics.median(still)
    figures = {
        "median": statistics.median(moving), "99th percentile": percentile(moving), "worst": max(moving),
    }  # fmt: skip
    others = {"median": normal, "99th percentile": percentile(still), "worst": max(still)}
    common = {"unit": "ms", "device": "cpu", "simulated": False}
    return [
        {"what": f"{name} {what}; baseline: {name} in between", "ours": value * 1e3,
         "baseline": others[name] * 1e3, "ratio": value / others[name], **common}
        for name, value in figures.items()
    ] + [
        {"what": f"worst {what}; baseline: median in between", "ours": max(moving) * 1e3,
         "baseline": normal * 1e3, "ratio": max(moving) / normal, **common}
    ]  # fmt: skip


def percentile(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * 99 // 100)]


def measure_rebalancing(model: Path) -> tuple[list[float], list[float], int]:
    """Seconds of decode steps while experts move, and of those in between; how often they have moved."""
    moving, still = list[float](), list[float]()
    flags = {"redundant_experts": 2, "rebalance_interval": 1.0, "rebalance_threshold": 1.0}
    with running(model, "1x2", **flags) as (loaded, options, _):
        core = EngineCore(loaded, options)
        runner = loaded.runner
        if not isinstance(runner, MeshRunner) or runner.rebalancing is None:
            raise SystemExit("this mesh does not move experts")
        sampling = SamplingParameters(max_tokens=150, ignore_eos=True)
        for turn in range(ROUNDS):
            for number in range(BATCH):  # another text in each round, so that loads change
                prompt = tuple(5 + (number * 31 + i * (turn + 1)) % 200 for i in range(PROMPT))
                core.submit(Request(number, prompt, sampling, seed=0))
            while core.load.running < BATCH or core.load.queued:
                core.step()
            core.step()
            while core.load.running == BATCH:
                begin, busy = time.perf_counter(), runner.rebalancing.moving
                core.step()
                seconds = time.perf_counter() - begin
                (moving if busy or runner.rebalancing.moving else still).append(seconds)
            while not core.idle:
                core.step()
        return moving, still, runner.rebalancing.count


def exchanged(loaded: LoadedModel) -> tuple[float, float]:
    """Bytes sent and seconds in exchanges since the start."""
    return loaded.runner.exchanged() if isinstance(loaded.runner, MeshRunner) else (0, 0.0)


@contextlib.contextmanager
def running(
    model: Path, mesh: str, **more: Any
) -> Iterator[tuple[LoadedModel, EngineOptions, list[subprocess.Popen[bytes]]]]:
    """The model over a mesh, and the processes of its other ranks on this machine."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        leader = f"127.0.0.1:{server.getsockname()[1]}"
    common = {"mesh": mesh, "mesh_leader": leader, "threads": 1, "context_length": 256, **more}
    options = EngineOptions(device="cpu", dtype="float32", max_batch_size=BATCH, **common)
    command = [sys.executable, "-c", "from moe_worker.main import main; main()", "serve"]
    command += ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--context-length", "256"]
    command += ["--max-batch-size", str(BATCH), "--threads", "1", "--mesh", mesh, "--mesh-leader", leader]
    for name, value in more.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    others = [
        subprocess.Popen([*command, "--mesh-rank", str(rank)], env=environment, stderr=subprocess.DEVNULL)
        for rank in range(1, MeshShape.parse(mesh).ranks)
    ]
    try:
        loaded = load(model, options, progress=False)
        yield loaded, options, others
        if loaded.member is not None:
            loaded.member.close()
    finally:
        for process in others:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
