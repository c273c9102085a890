"""A mesh on several GPUs of one machine, with one of them as the baseline of the same run.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_mesh [--mesh 1x2 2x1] [--format w4a8 bf16]
        [--batch 1 16 64 256] [--tokens 64] [--rounds 2] [--layers 27] [--fault | --accuracy | --moving 4]

Starts a process for each rank; meshes that need more GPUs than there are are left out, and named. For each
mesh and format: whether logits and greedy tokens of a small model are those of one GPU, then decode and
prefill of a model of the size of DeepSeek-V2-Lite (benchmarks/gpu_random.py), with random weights and
different prompts. A step is one token of every stream, whole engine included. A pipeline is measured with as
many micro-batches as stages, and with one. Kernel times of rank 0 are the profiler's; those of NCCL include
waiting for other ranks. The bubble is the share of a step in which rank 0 runs no other kernel. --fault kills
a rank under load. --accuracy compares logits of the mesh and of one GPU with those of the same weights in
float32 (benchmarks/gpu_mesh_accuracy.py). --moving moves experts of all layers under load, again after so
many seconds. One JSON object a line.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from benchmarks.gpu_mesh_accuracy import described, row_errors, settle_routes
from benchmarks.gpu_mesh_case import PAGE, Alone, Case, compared, random_tokens
from benchmarks.gpu_random import LARGE, SMALL, random_model
from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.mesh.member import Member, join
from moe_worker.models import cuda_graph, cuda_runner
from moe_worker.sampling.parameters import SamplingParameters

CONTEXT, PREFILL_SEQUENCES = 512, 64
FORMATS = {"bf16": "dense", "fp8": "fp8", "w4a16": "w4a16", "w4a8": "w4a8"}
ONE = "1x1"
UNDER_LOAD = "under load"
# Kernels of kernels/triton/exchange.py.
PACKING = {"_assign", "_pack", "_unpack", "_sum"}
# Largest difference of a row of logits, relative to its norm, of the small model.
TOLERANCE = 0.02


def engine(
    loaded: LoadedModel, options: EngineOptions, count: int, tokens: int, micro_batches: int | None = None,
    prompt: int = CONTEXT,
) -> EngineCore:  # fmt: skip
    core = EngineCore(loaded, options, micro_batches=micro_batches)
    sampling = SamplingParameters(max_tokens=tokens, ignore_eos=True)
    for number in range(count):
        ids = random_tokens(prompt, number, loaded.config.vocab_size)
        core.submit(Request(number, tuple(ids), sampling, seed=0))
    return core


def decode_ms(core: EngineCore, batch: int) -> float:
    """Milliseconds of a token of every stream, once all prompts have their first one."""
    seen = set[int]()
    while len(seen) < batch:
        seen |= {delta.id for delta in core.step()}
    torch.cuda.synchronize()
    begin, produced = time.perf_counter(), 0
    while not core.idle:
        produced += len(core.step())
    return (time.perf_counter() - begin) / (produced / batch) * 1e3


def prefill_rate(core: EngineCore) -> float:
    """Prompt tokens a second."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while not core.idle:
        core.step()
    return PREFILL_SEQUENCES * CONTEXT / (time.perf_counter() - begin)


class Kernels(NamedTuple):
    """Milliseconds in kernels: those of NCCL, those that pack and unpack tokens for exchanges, and all."""

    nccl: float
    packing: float
    total: float


def kernel_ms(work: Callable[[], object]) -> Kernels:
    """While `work` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    rows = [(each.key, each.device_time_total / 1e3) for each in seen.key_averages()]
    nccl = sum(ms for name, ms in rows if "nccl" in name.lower())
    packing = sum(ms for name, ms in rows if name in PACKING)
    return Kernels(nccl, packing, sum(ms for _, ms in rows))


def profiled(core: EngineCore, batch: int) -> Kernels:
    """`kernel_ms` of a token of every stream."""
    while core.load.queued or core.load.running < batch:
        core.step()
    produced = 0
    while produced < 4 * batch:
        produced += len(core.step())
    produced = 0

    def work() -> None:
        nonlocal produced
        while produced < 8 * batch:
            produced += len(core.step())

    found = kernel_ms(work)
    while not core.idle:
        core.step()
    return Kernels(*(ms * batch / produced for ms in found))


def exchange_bytes(case: Case, batch: int) -> int:
    """That a rank sends to others of its stage in a decode step of `batch` sequences."""
    shape, config, int8 = case.member.shape, case.config, case.part.sends_int8
    per_shard = case.part.graphs.size_for(-(-batch // shape.expert))
    activations = config.hidden_size * (1 if int8 else 2) + (config.hidden_size // 128 * 4 if int8 else 0)
    row = activations + 8 * config.moe.routing.per_token + 2 * config.hidden_size
    layers = len([layer for layer in case.part.stage.layers if layer not in config.dense_layers])
    return (shape.expert - 1) * case.part.capacity(per_shard) * row * layers


def tell(what: str, ours: float | None, unit: str, baseline: float | None = None, device: str = "") -> None:
    """One figure. The process that started this one adds the baseline of one GPU, if it has it."""
    ratio = None if ours is None or not baseline else ours / baseline
    device = device or torch.cuda.get_device_name()
    print(
        json.dumps({"what": what, "ours": ours, "baseline": baseline, "ratio": ratio, "unit": unit,
                    "device": device, "simulated": False}),
        flush=True,
    )  # fmt: skip


def measure(loaded: LoadedModel, arguments: argparse.Namespace, stages: int, case: Case | None) -> None:
    """Decode and prefill of one model."""
    options = EngineOptions(
        device="cuda", max_batch_size=max(*arguments.batch, PREFILL_SEQUENCES),
        prefill_tokens=arguments.prefill_tokens, prefix_cache=False, target_step_ms=10_000,
    )  # fmt: skip
    for batch in arguments.batch:
        for micro_batches in {stages, 1} if batch > 1 else {1}:
            name = f"decode, batch {batch}" + (
                f", {micro_batches} micro-batches" if micro_batches > 1 else ""
            )

            def run(tokens: int, batch: int = batch, micro: int = micro_batches) -> EngineCore:
                return engine(loaded, options, batch, tokens, micro)

            step = min(decode_ms(run(arguments.tokens), batch) for _ in range(arguments.rounds))
            tell(name, batch / step * 1e3, "tokens/s")
            if batch not in {arguments.batch[0], *arguments.batch[-2:]}:
                continue
            exchange, packing, total = profiled(run(24), batch)
            tell(f"{name}: step", step, "ms")
            tell(f"{name}: bubble of rank 0", 1 - (total - exchange) / step, "share of a step")
            if case is None:
                continue
            tell(f"{name}: kernels of NCCL on rank 0 in a step", exchange, "ms")
            tell(f"{name}: kernels that pack and unpack tokens in a step", packing, "ms")
            if stages == 1:
                tell(f"{name}: bytes to other ranks in a step", exchange_bytes(case, batch), "bytes")
    rates = [prefill_rate(engine(loaded, options, PREFILL_SEQUENCES, 1)) for _ in range(3)]
    tell(f"prefill, {arguments.prefill_tokens} tokens a step", max(rates), "tokens/s")
    small = EngineOptions(
        device="cuda", max_batch_size=PREFILL_SEQUENCES, prefill_tokens=4096, prefix_cache=False,
        target_step_ms=10_000,
    )  # fmt: skip
    rates = [prefill_rate(engine(loaded, small, PREFILL_SEQUENCES, 1)) for _ in range(3)]
    tell("prefill, 4096 tokens a step", max(rates), "tokens/s")


def check(case: Case) -> None:
    """Whether a small model has the logits and the greedy tokens of one GPU."""
    worst = max(worst for _, worst in compared(case, 20, 4))
    tell("largest difference of a row of logits, small model", worst, "of its norm", TOLERANCE)
    options = EngineOptions(device="cuda", max_batch_size=8, prefill_tokens=64)
    parts = case.member.shape.pipeline
    pairs = (case.loaded(), parts), (case.loaded_alone(), 1)
    found = [greedy(engine(loaded, options, 8, 16, count, prompt=20)) for loaded, count in pairs]
    same = sum(ours == theirs for ours, theirs in zip(*found, strict=True))
    tell("texts of 16 greedy tokens that are those of one GPU, small model", same, "texts", len(found[0]))


def accuracy(member: Member, number_format: str, device: torch.device) -> None:
    """Errors of the mesh, and as the baseline those of one GPU, against float32."""
    for layers in (3, 9):
        for change, routes in ((settle_routes, "routes that rounding cannot change"), (None, "all routes")):
            case = Case(
                member, SMALL | {"num_hidden_layers": layers}, number_format, device, 64, 8, 64, 64,
                change=change,
            )  # fmt: skip
            if not member.leads:
                case.runner.follow()
                continue
            ours, alone = (described(each) for each in row_errors(case, 48))
            for name, value in ours.items():
                unit = "of rows" if "share" in name else "of a row's norm"
                tell(f"error against float32, {layers} layers, {routes}: {name}", value, unit, alone[name])
            case.end()


def measure_moves(case: Case, batch: int, tokens: int, seconds: float) -> None:
    """Steps of decode while experts move, and in between."""
    options = EngineOptions(
        device="cuda", max_batch_size=batch, prefill_tokens=16384, prefix_cache=False, target_step_ms=10_000
    )
    core, rebalancing = engine(case.loaded(), options, batch, tokens), case.runner.rebalancing
    if rebalancing is None:
        raise ValueError("experts of this case stay")
    while core.load.queued or core.load.running < batch:
        core.step()
    rebalancing.abandon()  # the next move begins one interval later
    steps: dict[bool, list[float]] = {True: [], False: []}
    begin = time.perf_counter()
    while not core.idle and time.perf_counter() - begin < seconds:
        before, moving = time.perf_counter(), rebalancing.moving
        core.step()
        steps[moving or rebalancing.moving].append((time.perf_counter() - before) * 1e3)
    for request in range(batch):
        core.cancel(request)
    while not core.idle:
        core.step()
    between = statistics.median(steps[False])
    for moving, name in ((False, "in between"), (True, "while experts move")):
        own = steps[moving]
        if not own:
            continue
        what = f"decode, batch {batch}, {name}"
        tell(f"{what}: {len(own)} steps, median", statistics.median(own), "ms", between)
        tell(f"{what}: 99 of 100 steps", sorted(own)[len(own) * 99 // 100], "ms", between)
        tell(f"{what}: worst step", max(own), "ms", between)
    tell("times that experts of all layers moved", rebalancing.count, "times")
    tell("layers whose experts have moved", len(rebalancing.places.moved), "layers")


def greedy(core: EngineCore) -> list[list[int | None]]:
    texts: dict[int, list[int | None]] = {}
    while not core.idle:
        for delta in core.step():
            texts.setdefault(delta.id, []).append(delta.token)
    return [texts[number] for number in sorted(texts)]


def sizes(arguments: argparse.Namespace, shape: MeshShape) -> tuple[int, int, int]:
    """Sequences at most, context, and pages. Few graphs are recorded, and few sizes of prefill compiled."""
    most = max(*arguments.batch, PREFILL_SEQUENCES)
    parts = {-(-batch // part) for batch in arguments.batch for part in (1, shape.expert, shape.pipeline)}
    parts |= {-(-batch // shape.ranks) for batch in arguments.batch}
    wanted = {1, 8, *parts, most}
    cuda_graph.batch_sizes = lambda largest: sorted({size for size in wanted if size <= largest} | {largest})
    few = [size for size in cuda_runner.warm_sizes(4096) if size in {1, 128, 1024, 4096}]
    for module in (cuda_runner, sys.modules["moe_worker.mesh.cuda_stage"]):
        module.warm_sizes = lambda _: few  # type: ignore[attr-defined]
    context = CONTEXT + arguments.tokens + 32
    return most, context, most * -(-context // PAGE)


def run_alone(arguments: argparse.Namespace) -> None:
    """The baseline."""
    device = torch.device("cuda", arguments.rank)
    torch.cuda.set_device(device)
    most, context, pages = sizes(arguments, MeshShape())
    values = LARGE | {"num_hidden_layers": arguments.layers}
    with torch.inference_mode():
        model = random_model(values, FORMATS[arguments.format[0]], context, device)
    whole = Alone(model, context, most, pages, arguments.prefill_tokens)
    measure(whole.loaded(), arguments, 1, None)


def run_rank(arguments: argparse.Namespace) -> NoReturn:
    begin = time.perf_counter()
    device = torch.device("cuda", arguments.rank)
    options = EngineOptions(
        device=str(device), mesh=arguments.mesh[0], mesh_leader=arguments.address, mesh_rank=arguments.rank
    )
    member = join(options, "benchmark", device)
    name = FORMATS[arguments.format[0]]
    most, context, pages = sizes(arguments, member.shape)
    if arguments.accuracy:
        accuracy(member, name, device)
        leave()
    if not arguments.fault and not arguments.moving:
        small = SMALL | {"num_hidden_layers": 2}
        case = Case(member, small, name, device, 64, 8, 64, 64)
        if member.leads:
            check(case)
            case.end()
        else:
            case.runner.follow()
        del case
    values = LARGE | {"num_hidden_layers": arguments.layers}
    case = Case(
        member, values, name, device, context, most, pages, arguments.prefill_tokens, arguments.redundant,
        alone=False, moving=arguments.moving,
    )  # fmt: skip
    dist.barrier()
    if not member.leads:
        case.runner.follow()
    elif arguments.fault:
        decode_until_killed(case, most)
    else:
        tell("start of all ranks", time.perf_counter() - begin, "s")
        if arguments.moving:
            measure_moves(case, arguments.batch[0], arguments.tokens, arguments.seconds)
        else:
            measure(case.loaded(), arguments, member.shape.pipeline, case)
        case.end()
    leave()


def leave() -> NoReturn:
    """Ends this process together with the other ranks'."""
    torch.cuda.synchronize()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # captured exchanges would outlive their communicators


def decode_until_killed(case: Case, batch: int) -> NoReturn:
    options = EngineOptions(device="cuda", max_batch_size=batch, prefill_tokens=4096, prefix_cache=False)
    while True:
        core = engine(case.loaded(), options, 16, 64, prompt=64)
        while not core.idle:
            core.step()
        print(UNDER_LOAD, flush=True)


def started(arguments: argparse.Namespace, mesh: str, name: str, rank: int, address: str, *more: str) -> Any:
    """The process of one rank."""
    command = [sys.executable, "-m", "benchmarks.gpu_mesh", "--mesh", mesh, "--format", name]
    command += ["--batch", *map(str, arguments.batch), "--tokens", str(arguments.tokens)]
    command += ["--rounds", str(arguments.rounds), "--layers", str(arguments.layers)]
    command += ["--prefill-tokens", str(arguments.prefill_tokens), "--redundant", str(arguments.redundant)]
    command += ["--moving", str(arguments.moving), "--seconds", str(arguments.seconds)]
    command += ["--accuracy"] if arguments.accuracy else []
    command += ["--address", address, "--rank", str(rank), *more]
    environment = os.environ | {"MOE_WORKER_MESH_SECRET": "of a benchmark"}
    piped = subprocess.PIPE if rank == 0 or mesh == ONE else None
    return subprocess.Popen(command, env=environment, stdout=piped, text=True)


def ranks_of(arguments: argparse.Namespace, mesh: str, name: str, *more: str) -> list[Any]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    ranks = range(MeshShape.parse(mesh).ranks)
    return [started(arguments, mesh, name, rank, address, *more) for rank in ranks]


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
    running = ranks_of(arguments, mesh, name)
    try:
        for row in figures(running[0]):
            baseline = row["baseline"] or known.get((name, re.sub(", . micro-batches", "", row["what"])))
            row |= {"what": f"{name}, mesh {mesh}: {row['what']}", "baseline": baseline}
            row["ratio"] = row["ours"] / baseline if baseline else None
            print(json.dumps(row), flush=True)
    finally:
        ended(running)


def await_load(leader: Any) -> None:
    """Returns once the mesh has decoded a batch, or has ended."""
    for line in leader.stdout:
        if line.startswith(UNDER_LOAD):
            return


def kill_one(arguments: argparse.Namespace, mesh: str) -> None:
    """Seconds from the death of a rank to the end of the leader, and until all ranks, started again at once,
    have decoded a batch.
    """
    running = ranks_of(arguments, mesh, arguments.format[0], "--fault")
    try:
        await_load(running[0])
        begin = time.monotonic()
        running[-1].send_signal(signal.SIGKILL)
        status = running[0].wait(60)
        tell(f"mesh {mesh}: a rank killed under load, until rank 0 ends with status {status}",
             time.monotonic() - begin, "s", device="GPUs")  # fmt: skip
        ended(running)
        running = ranks_of(arguments, mesh, arguments.format[0], "--fault")
        await_load(running[0])
        tell(f"mesh {mesh}: a rank killed under load, until all have started again and decoded a batch",
             time.monotonic() - begin, "s", device="GPUs")  # fmt: skip
    finally:
        ended(running)
    for what in ("serving on without a lost rank", "meeting again after a rank is lost"):
        tell(f"{what}: not supported on GPUs", None, "", device="GPUs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", nargs="+", default=["1x2", "2x1", "2x2", "1x4"])
    parser.add_argument("--format", nargs="+", default=["w4a8", "bf16"], choices=list(FORMATS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--prefill-tokens", type=int, default=16384)
    parser.add_argument("--redundant", type=int, default=0)
    parser.add_argument("--fault", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--moving", type=float, default=0.0, help="seconds from one move to the next")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the measurement with --moving")
    parser.add_argument("--rank", type=int, help="for the processes that this one starts")
    parser.add_argument("--address")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        (run_alone if arguments.mesh == [ONE] else run_rank)(arguments)
        return
    count = torch.cuda.device_count()
    fitting = [mesh for mesh in arguments.mesh if MeshShape.parse(mesh).ranks <= count]
    for mesh in arguments.mesh:
        if mesh not in fitting:
            tell(f"mesh {mesh}: not run, {count} GPUs", None, "", device="GPUs")
    if arguments.fault:
        kill_one(arguments, fitting[0])
        return
    known = {} if arguments.accuracy or arguments.moving else baselines(arguments)
    for name in arguments.format:
        for mesh in fitting:
            compare(arguments, mesh, name, known)


if __name__ == "__main__":
    main()
