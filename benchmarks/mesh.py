"""Cost of a mesh on one machine's CPUs: time of a decode step, and what the exchange of tokens takes of it.

    python -m benchmarks.mesh [--model examples/docs-moe] [--meshes 1x1,1x2,2x1,2x2] [--json]

Each rank is a process with one thread, so more ranks than cores share them. The baseline of each line is the
same model in one process (mesh 1x1), measured in the same run. Bytes are those that rank 0 sends to others.
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

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.engine.requests import Request
from moe_worker.mesh.runner import MeshRunner
from moe_worker.sampling.parameters import SamplingParameters

BATCH, STEPS, PROMPT = 8, 40, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "examples" / "docs-moe")
    parser.add_argument("--meshes", default="1x1,1x2,2x1,2x2")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    baseline = None
    for mesh in arguments.meshes.split(","):
        found = measure(arguments.model, mesh)
        baseline = baseline or found["step_ms"]
        for row in rows(mesh, found, baseline):
            print(json.dumps(row) if arguments.json else f"{row['what']}: {row['ours']:.2f} {row['unit']}")


def rows(mesh: str, found: dict[str, float], baseline: float) -> list[dict[str, Any]]:
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


def measure(model: Path, mesh: str) -> dict[str, float]:
    """Medians over steps of BATCH sequences; the exchange includes the wait for slower ranks."""
    with running(model, mesh) as (loaded, options):
        core = EngineCore(loaded, options)
        sampling = SamplingParameters(max_tokens=STEPS + 20, ignore_eos=True)
        for number in range(BATCH):
            prompt = tuple(5 + (number * 31 + i) % 200 for i in range(PROMPT))
            core.submit(Request(number, prompt, sampling, seed=0))
        while core.load.running < BATCH:
            core.step()
        for _ in range(8):
            core.step()
        times, before = [], exchanged(loaded)
        for _ in range(STEPS):
            begin = time.perf_counter()
            core.step()
            times.append(time.perf_counter() - begin)
        after = exchanged(loaded)
    nbytes, seconds = ((now - then) / STEPS for now, then in zip(after, before, strict=True))
    return {"step_ms": statistics.median(times) * 1e3, "exchange_ms": seconds * 1e3, "bytes": nbytes}


def exchanged(loaded: LoadedModel) -> tuple[float, float]:
    """Bytes sent and seconds in exchanges since the start."""
    return loaded.runner.exchanged() if isinstance(loaded.runner, MeshRunner) else (0, 0.0)


@contextlib.contextmanager
def running(model: Path, mesh: str) -> Iterator[tuple[LoadedModel, EngineOptions]]:
    """The model over a mesh whose other ranks are processes of this machine."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        leader = f"127.0.0.1:{server.getsockname()[1]}"
    common = {"mesh": mesh, "mesh_leader": leader, "threads": 1, "context_length": 256}
    options = EngineOptions(device="cpu", dtype="float32", max_batch_size=BATCH, **common)  # type: ignore[arg-type]
    command = [sys.executable, "-c", "from moe_worker.main import main; main()", "serve"]
    command += ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--context-length", "256"]
    command += ["--max-batch-size", str(BATCH), "--threads", "1", "--mesh", mesh, "--mesh-leader", leader]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    others = [
        subprocess.Popen([*command, "--mesh-rank", str(rank)], env=environment, stderr=subprocess.DEVNULL)
        for rank in range(1, MeshShape.parse(mesh).ranks)
    ]
    try:
        loaded = load(model, options, progress=False)
        yield loaded, options
        if loaded.member is not None:
            loaded.member.close()
    finally:
        for process in others:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
