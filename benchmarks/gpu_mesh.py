"""A mesh on several GPUs of one machine, with one of them as the baseline of the same run.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_mesh [--mesh 1x2 2x1] [--format w4a8 bf16]
        [--batch 1 16 64 256] [--tokens 64] [--rounds 2] [--layers 27] [--tls FOLDER]
        [--fault killed|hung|leader [--cold] | --accuracy | --moving 4]

Starts a process for each rank; meshes that need more GPUs than there are are left out, and named. For each
mesh and format: whether logits and greedy tokens of a small model are those of one GPU, then decode and
prefill of a model of the size of DeepSeek-V2-Lite (benchmarks/gpu_random.py), with random weights and
different prompts. A step is one token of every stream, whole engine included. A pipeline is measured with as
many micro-batches as stages, and with one. Kernel times of rank 0 are the profiler's; those of NCCL include
waiting for other ranks. The bubble is the share of a step in which rank 0 runs no other kernel. --fault kills
a rank, or the leader, under load and starts it again at once, or stops a rank for HUNG_S seconds; with
--redundant 64, the other has all experts and goes on. --cold: a rank that is started again finds no compiled
kernels. --tls: encrypts the control connections by tls.crt, tls.key and ca.crt in this folder.
--accuracy compares logits of the mesh and of one GPU with those of the same weights in
float32 (benchmarks/gpu_mesh_accuracy.py). --moving moves experts of all layers under load, again after so
many seconds. One JSON object a line.
"""

import argparse
import faulthandler
import gc
import json
import logging
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from benchmarks.commands import above_zero, amount, at_least_two, mesh_name, need_gpu, not_negative, positive
from benchmarks.gpu_mesh_case import PAGE, Alone, Case
from benchmarks.gpu_mesh_measure import (
    CONTEXT,
    PREFILL_SEQUENCES,
    accuracy,
    check,
    engine,
    measure,
    measure_moves,
    tell,
)
from benchmarks.gpu_random import LARGE, SMALL, random_model
from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine.following import follow_leader
from moe_worker.engine.requests import FinishReason
from moe_worker.garbage import collect_rarely, spare_loaded
from moe_worker.mesh.member import Member, join
from moe_worker.models import cuda_graph, cuda_prompts, cuda_runner

FORMATS = {"bf16": "dense", "fp8": "fp8", "w4a16": "w4a16", "w4a8": "w4a8"}
ONE = "1x1"
UNDER_LOAD, ALL_BACK, STEPPED = "under load", "all ranks are back at", "the first step of all streams at"
# Steps before a rank is killed, and after all ranks are back.
SETTLED = 50
# Of a garbage collection that is told.
LONG_S = 3e-3
# Longer than a rank may be silent (mesh/pulse.py).
HUNG_S = 18.0
KILLED, HUNG, LEADER = "killed", "hung", "leader"


def sizes(arguments: argparse.Namespace, shape: MeshShape) -> tuple[int, int, int]:
    """Sequences at most, context, and pages. Few graphs are recorded, and few sizes of prefill compiled."""
    most = max(*arguments.batch, PREFILL_SEQUENCES)
    parts = {-(-batch // part) for batch in arguments.batch for part in (1, shape.expert, shape.pipeline)}
    parts |= {-(-batch // shape.ranks) for batch in arguments.batch}
    wanted = {1, 8, *parts, most}
    cuda_graph.batch_sizes = lambda largest: sorted({size for size in wanted if size <= largest} | {largest})
    cuda_prompts.token_sizes = lambda most: sorted({min(1024, most), min(2048, most), most})
    largest = arguments.prefill_tokens + most
    few = [size for size in cuda_runner.warm_sizes(largest) if size in {1, 128, 1024, 4096, largest}]
    for module in (cuda_runner, sys.modules["moe_worker.mesh.cuda_stage"]):
        module.warm_sizes = lambda _: few  # type: ignore[attr-defined]
    context = CONTEXT + arguments.tokens + 32
    return most, context, most * -(-context // PAGE)


def run_alone(arguments: argparse.Namespace) -> None:
    """The baseline."""
    gc.callbacks.append(Collections(arguments.rank).note)
    device = torch.device("cuda", arguments.rank)
    torch.cuda.set_device(device)
    most, context, pages = sizes(arguments, MeshShape())
    values = LARGE | {"num_hidden_layers": arguments.layers}
    with torch.inference_mode():
        model = random_model(values, FORMATS[arguments.format[0]], context, device)
    whole = Alone(model, context, most, pages, arguments.prefill_tokens)
    spare_loaded()
    collect_rarely()
    measure(whole.loaded(), arguments, 1, None)


class Collections:
    """Tells of those of Python's garbage collections that take longer than a step."""

    def __init__(self, rank: int) -> None:
        self._rank, self._began = rank, 0.0

    def note(self, phase: str, info: dict[str, int]) -> None:
        """A callback of `gc`."""
        now = time.perf_counter()
        if phase == "start":
            self._began = now
        elif now - self._began > LONG_S:
            took, generation = (now - self._began) * 1e3, info["generation"]
            print(f"rank {self._rank}: collection {generation} took {took:.1f} ms", file=sys.stderr)


def run_rank(arguments: argparse.Namespace) -> NoReturn:
    begin = time.perf_counter()
    logging.basicConfig(format=f"%(asctime)s rank {arguments.rank}: %(message)s", level=logging.INFO)

    def reached(what: str) -> None:
        print(f"rank {arguments.rank}: {what} after {time.perf_counter() - begin:.1f} s", file=sys.stderr)

    gc.callbacks.append(Collections(arguments.rank).note)
    device = torch.device("cuda", arguments.rank)
    options = EngineOptions(
        device=str(device), mesh=arguments.mesh[0], mesh_leader=arguments.address, mesh_rank=arguments.rank,
        mesh_tls=arguments.tls,
    )  # fmt: skip
    member = join(options, "benchmark", device)
    reached("joined")
    name = FORMATS[arguments.format[0]]
    most, context, pages = sizes(arguments, member.shape)
    if arguments.accuracy:
        accuracy(member, name, device)
        leave()
    if not arguments.fault and not arguments.moving:
        check_small(member, name, device)
    values = LARGE | {"num_hidden_layers": arguments.layers}
    case = Case(
        member, values, name, device, context, most, pages, arguments.prefill_tokens, arguments.redundant,
        alone=False, moving=arguments.moving, faults=arguments.fault is not None,
    )  # fmt: skip
    spare_loaded()
    collect_rarely()
    reached("model and graphs made")
    if not arguments.fault:
        dist.barrier()
    if not member.leads:
        follow_leader(case.runner)
    elif arguments.fault:
        decode_through_a_loss(case, arguments.batch[0], arguments.tokens)
    else:
        tell("start of all ranks", time.perf_counter() - begin, "s")
        if arguments.moving:
            measure_moves(case, arguments.batch[0], arguments.tokens, arguments.seconds)
        else:
            measure(case.loaded(), arguments, member.shape.pipeline, case)
        case.end()
    reached("done")
    leave()


def check_small(member: Member, name: str, device: torch.device) -> None:
    """Compares a small model in the mesh with the same on one GPU."""
    case = Case(member, SMALL | {"num_hidden_layers": 2}, name, device, 64, 8, 64, 64)
    if member.leads:
        check(case)
        case.end()
    else:
        case.runner.follow()


def leave() -> NoReturn:
    """Ends this process together with the other ranks'."""
    torch.cuda.synchronize()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # captured exchanges would outlive their communicators


def decode_through_a_loss(case: Case, batch: int, tokens: int) -> NoReturn:
    """Decodes, while a rank is killed and comes back, and ends this process."""
    options = EngineOptions(
        device="cuda", max_batch_size=batch, prefill_tokens=16384, prefix_cache=False, target_step_ms=10_000
    )
    core, member = engine(case.loaded(), options, batch, tokens), case.member
    steps: dict[tuple[int, int], list[float]] = {}
    last, failed = time.monotonic(), 0
    while not core.idle:
        deltas = core.step()
        failed += sum(delta.finish_reason is FinishReason.FAILED for delta in deltas)
        if len(deltas) < batch:  # prompts, first ones and those after a loss
            continue
        now = time.monotonic()
        own = steps.setdefault((member.formation, len(member.present)), [])
        own.append(now - last)
        if len(own) == 1:
            print(STEPPED, now, flush=True)
        last = now
        if len(own) == SETTLED and member.formation == 0:
            print(UNDER_LOAD, flush=True)
        if member.formation and not member.absent:
            if len(own) == 1:
                print(ALL_BACK, now, flush=True)
            if len(own) == SETTLED:
                break
    for (formation, present), own in steps.items():
        what = f"decode, batch {batch}, formation {formation} of {present} ranks"
        if formation:
            tell(f"{what}: pause before its first step, recomputation included", own[0], "s")
        tell(f"{what}: median of {len(own) - 1} steps", statistics.median(own[1:] or own) * 1e3, "ms")
    tell("streams that failed", failed, "streams")
    sys.stdout.flush()
    os._exit(0)


def started(
    arguments: argparse.Namespace, mesh: str, name: str, rank: int, address: str, **changed: str
) -> Any:
    """The process of one rank. changed: of its environment."""
    command = [sys.executable, "-m", "benchmarks.gpu_mesh", "--mesh", mesh, "--format", name]
    command += ["--batch", *map(str, arguments.batch), "--tokens", str(arguments.tokens)]
    command += ["--rounds", str(arguments.rounds), "--layers", str(arguments.layers)]
    command += ["--prefill-tokens", str(arguments.prefill_tokens), "--redundant", str(arguments.redundant)]
    command += ["--moving", str(arguments.moving), "--seconds", str(arguments.seconds)]
    command += ["--limit", str(arguments.limit), *(["--accuracy"] if arguments.accuracy else [])]
    command += ["--fault", arguments.fault] if arguments.fault else []
    command += ["--tls", arguments.tls, "--address", address, "--rank", str(rank)]
    environment = os.environ | {"MOE_WORKER_MESH_SECRET": "of a benchmark"} | changed
    piped = subprocess.PIPE if rank == 0 or mesh == ONE else None
    return subprocess.Popen(command, env=environment, stdout=piped, text=True)


def free_address() -> str:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def ranks_of(arguments: argparse.Namespace, mesh: str, name: str, address: str) -> list[Any]:
    return [started(arguments, mesh, name, rank, address) for rank in range(MeshShape.parse(mesh).ranks)]


def figures(process: Any) -> Iterator[dict[str, Any]]:
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def ended(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def baselines(arguments: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Figures of one GPU, by format and name; one format on each GPU."""
    found: dict[tuple[str, str], float] = {}
    count = torch.cuda.device_count()
    for first in range(0, len(arguments.format), count):
        names = arguments.format[first : first + count]
        running = [started(arguments, ONE, name, place, "none") for place, name in enumerate(names)]
        try:
            for name, process in zip(names, running, strict=True):
                for row in figures(process):
                    found[name, row["what"]] = row["ours"]
                    print(json.dumps(row | {"what": f"{name}, one GPU: {row['what']}"}), flush=True)
        finally:
            ended(running)
    return found


def compare(arguments: argparse.Namespace, mesh: str, name: str, known: dict[tuple[str, str], float]) -> None:
    running = ranks_of(arguments, mesh, name, free_address())
    try:
        for row in figures(running[0]):
            baseline = row["baseline"] or known.get((name, re.sub(", . micro-batches", "", row["what"])))
            row |= {"what": f"{name}, mesh {mesh}: {row['what']}", "baseline": baseline}
            row["ratio"] = row["ours"] / baseline if baseline else None
            print(json.dumps(row), flush=True)
    finally:
        ended(running)


def lose_one(arguments: argparse.Namespace, mesh: str) -> None:
    """Kills the last rank, or the leader, under load and starts it again at once; or stops the last for a
    while.
    """
    name, address, fault = arguments.format[0], free_address(), arguments.fault
    running = ranks_of(arguments, mesh, name, address)
    lost = 0 if fault == LEADER else len(running) - 1
    begin = None
    with tempfile.TemporaryDirectory() as empty:
        try:
            for line in running[0].stdout:
                if line.startswith(UNDER_LOAD):
                    break
                tell_row(mesh, line)
            begin = time.monotonic()
            if fault == HUNG:
                running[lost].send_signal(signal.SIGSTOP)
                threading.Timer(HUNG_S, running[lost].send_signal, [signal.SIGCONT]).start()
            else:
                running[lost].kill()
                running[lost].wait()
                changed = {"TRITON_CACHE_DIR": empty} if arguments.cold else {}
                running[lost] = started(arguments, mesh, name, lost, address, **changed)
            for line in running[0].stdout:
                if line.startswith(ALL_BACK):
                    took = float(line.removeprefix(ALL_BACK)) - begin
                    tell(f"mesh {mesh}: {fault}, until all serve again", took, "s", device="GPUs")
                elif line.startswith(STEPPED):
                    took = float(line.removeprefix(STEPPED)) - begin
                    tell(f"mesh {mesh}: {fault}, until all streams get a token", took, "s", device="GPUs")
                elif line.startswith(UNDER_LOAD):  # a new leader's
                    break
                tell_row(mesh, line)
            else:
                tell(f"mesh {mesh}: exit status of rank 0", running[0].wait(), "", device="GPUs")
        finally:
            ended(running)


def tell_row(mesh: str, line: str) -> None:
    """What a rank has measured; other lines are for the harness."""
    if line.startswith("{"):
        row = json.loads(line)
        print(json.dumps(row | {"what": f"mesh {mesh}: {row['what']}"}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mesh",
        nargs="+",
        type=mesh_name,
        default=["1x2", "2x1", "2x2", "1x4"],
        help="stages x ranks of each",
    )
    parser.add_argument("--format", nargs="+", default=["w4a8", "bf16"], choices=list(FORMATS))
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 16, 64, 256], help="streams")
    parser.add_argument("--tokens", type=at_least_two, default=64, help="generated by each stream")
    parser.add_argument("--rounds", type=positive, default=2, help="figures are medians of them")
    parser.add_argument("--layers", type=positive, default=27)
    parser.add_argument("--prefill-tokens", type=positive, default=16384, help="prompt tokens of one step")
    parser.add_argument("--redundant", type=not_negative, default=0, help="copies of experts in each layer")
    parser.add_argument(
        "--fault", nargs="?", const=KILLED, choices=[KILLED, HUNG, LEADER], help="what happens to a rank"
    )
    parser.add_argument("--cold", action="store_true", help="no compiled kernels, with --fault")
    parser.add_argument("--tls", default="", help="folder of a certificate for the control connections")
    parser.add_argument("--accuracy", action="store_true", help="compare logits with float32")
    parser.add_argument("--moving", type=amount, default=0.0, help="seconds from one move to the next")
    parser.add_argument("--seconds", type=above_zero, default=20.0, help="of the measurement with --moving")
    parser.add_argument("--no-baselines", action="store_true", help="measure no single GPU")
    parser.add_argument(
        "--limit", type=above_zero, default=600.0, help="seconds until a rank prints its stacks"
    )
    parser.add_argument("--rank", type=not_negative, help="for the processes that this one starts")
    parser.add_argument("--address")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        faulthandler.dump_traceback_later(arguments.limit, exit=True)
        (run_alone if arguments.mesh == [ONE] else run_rank)(arguments)
        return
    need_gpu(parser)
    count = torch.cuda.device_count()
    fitting = [mesh for mesh in arguments.mesh if MeshShape.parse(mesh).ranks <= count]
    for mesh in arguments.mesh:
        if mesh not in fitting:
            tell(f"mesh {mesh}: not run, {count} GPUs", None, "", device="GPUs")
    if arguments.fault:
        for mesh in fitting:
            lose_one(arguments, mesh)
        return
    alone = not (arguments.accuracy or arguments.moving or arguments.no_baselines)
    known = baselines(arguments) if alone else {}
    for name in arguments.format:
        for mesh in fitting:
            compare(arguments, mesh, name, known)


if __name__ == "__main__":
    main()
