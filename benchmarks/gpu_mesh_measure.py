"""Figures of a model on one GPU, or on a mesh of several, each printed as a JSON object.

See benchmarks/gpu_mesh.py, which starts the processes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch

from benchmarks.gpu_mesh_accuracy import described, row_errors, settle_routes
from benchmarks.gpu_mesh_case import Case, compared, random_tokens
from benchmarks.gpu_random import SMALL
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.mesh.member import Member
from moe_worker.sampling.parameters import SamplingParameters

CONTEXT, PREFILL_SEQUENCES = 512, 64
# Lengths of prompts that differ, so that the shards of a step do.
UNEVEN = range(16, CONTEXT + 1)
# Kernels of kernels/triton/exchange.py.
PACKING = {"_assign", "_pack", "_unpack", "_sum"}
# Steps before moves are measured.
SETTLING = 8
# A step is late if it takes so many times the median one.
LATE = 2.0
# Largest difference of a row of logits, relative to its norm, of the small model.
TOLERANCE = 0.02


def engine(
    loaded: LoadedModel, options: EngineOptions, count: int, tokens: int, micro_batches: int | None = None,
    prompt: int | None = CONTEXT,
) -> EngineCore:  # fmt: skip
    """With `count` requests; prompts of None tokens have UNEVEN ones."""
    core = EngineCore(loaded, options, micro_batches=micro_batches)
    sampling = SamplingParameters(max_tokens=tokens, ignore_eos=True)
    for number in range(count):
        length = UNEVEN[number * 31 % len(UNEVEN)] if prompt is None else prompt
        ids = random_tokens(length, number, loaded.config.vocab_size)
        core.submit(Request(number, tuple(ids), sampling, seed=0))
    return core


def decode_ms(core: EngineCore, batch: int) -> float:
    """Milliseconds of a token of every stream, once all prompts have their first one. Late steps go to
    stderr.
    """
    seen = set[int]()
    while len(seen) < batch:
        seen |= {delta.id for delta in core.step()}
    torch.cuda.synchronize()
    begin, produced, ends = time.perf_counter(), 0, list[float]()
    while not core.idle:
        produced += len(core.step())
        ends.append(time.perf_counter())
    steps = [(after - before) * 1e3 for before, after in pairwise([begin, *ends])]
    usual = statistics.median(steps)
    for number, took in enumerate(steps):
        if took > LATE * usual:
            print(
                f"batch {batch}: step {number} of {len(steps)} took {took:.1f} ms, usual {usual:.1f}",
                file=sys.stderr,
            )
    return (ends[-1] - begin) / (produced / batch) * 1e3


def prefill_rate(core: EngineCore) -> float:
    """Prompt tokens a second."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while not core.idle:
        core.step()
    return core.counters.prompt_tokens / (time.perf_counter() - begin)


class Kernels(NamedTuple):
    """Milliseconds in kernels: those of NCCL, and those that pack and unpack tokens for exchanges.

    exposed: in which none but those of NCCL ran; busy: in which another one did, several at the same time
    counted once; whole: from the first to the last.
    """

    nccl: float
    exposed: float
    packing: float
    busy: float
    whole: float


def kernel_ms(work: Callable[[], object]) -> Kernels:
    """While `work` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    ran = [each for each in seen.events() if each.device_type.name == "CUDA"]
    spans = sorted((each.time_range.start, each.time_range.end, each.name) for each in ran)
    nccl = sum(end - start for start, end, name in spans if "nccl" in name.lower())
    packing = sum(end - start for start, end, name in spans if name in PACKING)
    busy = covered((start, end) for start, end, name in spans if "nccl" not in name.lower())
    exposed = covered((start, end) for start, end, _ in spans) - busy
    whole = max(end for _, end, _ in spans) - spans[0][0] if spans else 0.0
    return Kernels(*(us / 1e3 for us in (nccl, exposed, packing, busy, whole)))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans, which begin in rising order."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


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
    layers = sum(layer in config.moe_layers for layer in case.part.stage.layers)
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
    """Decode and prefill of one model; then the profiler, behind which each launch takes the host longer."""
    options = EngineOptions(
        device="cuda", max_batch_size=max(*arguments.batch, PREFILL_SEQUENCES),
        prefill_tokens=arguments.prefill_tokens, prefix_cache=False, target_step_ms=10_000,
    )  # fmt: skip
    steps: dict[tuple[int, int], float] = {}
    for batch in arguments.batch:
        for micro_batches in {stages, 1} if batch > 1 else {1}:
            rounds = sorted(
                decode_ms(engine(loaded, options, batch, arguments.tokens, micro_batches), batch)
                for _ in range(arguments.rounds)
            )
            step, name = statistics.median(rounds), decoding(batch, micro_batches)
            steps[batch, micro_batches] = step
            tell(name, batch / step * 1e3, "tokens/s")
            tell(f"{name}: slowest of {len(rounds)} rounds", batch / rounds[-1] * 1e3, "tokens/s")
    for tokens in (arguments.prefill_tokens, 4096, 2048):
        small = EngineOptions(
            device="cuda", max_batch_size=PREFILL_SEQUENCES, prefill_tokens=tokens, prefix_cache=False,
            target_step_ms=10_000,
        )  # fmt: skip
        what = f"prefill, {tokens} tokens a step"
        prompts: dict[str, int | None] = {what: CONTEXT}
        if tokens <= 2048:
            prompts[f"{what}, prompts of {UNEVEN[0]} to {UNEVEN[-1]}"] = None
        for name, prompt in prompts.items():
            # The first round records graphs.
            rates = [
                prefill_rate(engine(loaded, small, PREFILL_SEQUENCES, 1, prompt=prompt))
                for _ in range(1 + arguments.rounds)
            ]
            tell(name, statistics.median(rates[1:]), "tokens/s")
            print(name, [round(rate) for rate in rates], file=sys.stderr)
    for (batch, micro_batches), step in steps.items():
        if batch in {arguments.batch[0], *arguments.batch[-2:]}:
            kernels = profiled(engine(loaded, options, batch, 24, micro_batches), batch)
            tell_kernels(decoding(batch, micro_batches), kernels, step, batch, stages, case)


def decoding(batch: int, micro_batches: int) -> str:
    """The name of a figure."""
    return f"decode, batch {batch}" + (f", {micro_batches} micro-batches" if micro_batches > 1 else "")


def tell_kernels(
    name: str, kernels: Kernels, step: float, batch: int, stages: int, case: Case | None
) -> None:
    """step: milliseconds, without the profiler."""
    tell(f"{name}: step", step, "ms")
    bubble = 1 - kernels.busy / kernels.whole
    tell(f"{name}: bubble of rank 0", bubble, "share of a profiled step")
    if case is None:
        return
    tell(f"{name}: kernels of NCCL on rank 0 in a step", kernels.nccl, "ms")
    hidden = 1 - kernels.exposed / kernels.nccl
    tell(f"{name}: overlap of NCCL with other kernels of rank 0", hidden, "share of its time")
    tell(f"{name}: kernels that pack and unpack tokens in a step", kernels.packing, "ms")
    if stages == 1:
        tell(f"{name}: bytes to other ranks in a step", exchange_bytes(case, batch), "bytes")


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
    for _ in range(SETTLING):  # of which the first ones wait for the prompts
        core.step()
    rebalancing.abandon()  # the next move begins one interval later
    begin = time.perf_counter()
    steps: dict[bool, list[float]] = {True: [], False: []}
    placed, slowest = begin, list[tuple[float, str]]()
    while not core.idle and time.perf_counter() - begin < seconds:
        before, moving = time.perf_counter(), rebalancing.moving
        core.step()
        after = time.perf_counter()
        placed = after if moving != rebalancing.moving else placed
        steps[moving or rebalancing.moving].append((after - before) * 1e3)
        where = f"{before - begin:.3f} s, {before - placed:.3f} s behind a beginning or end of a move"
        slowest = sorted([*slowest, (steps[moving or rebalancing.moving][-1], where)])[-8:]
    for took, where in slowest:
        print(f"a step of {took:.1f} ms at {where}", file=sys.stderr)
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
