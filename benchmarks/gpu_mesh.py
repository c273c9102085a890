"""Decode and prefill of a mesh on several GPUs of one machine, with one of them as the baseline.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_mesh --mesh 1x2 [--format w4a8] [--batch 1 16 64 256]
        [--tokens 64] [--rounds 2] [--layers 27]

Starts a process for each rank. Weights are random, prompts differ. The baseline is the same model on one GPU
of the same run. Decode counts whole engine steps. The time of NCCL's kernels in a step of rank 0 comes from
the profiler and includes waiting for other ranks. One JSON object a line.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist

from benchmarks.gpu_random import LARGE, config_of, random_model
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.mesh.cuda_stage import CudaStage
from moe_worker.mesh.member import Member, join
from moe_worker.mesh.messages import End
from moe_worker.mesh.part import stage_of
from moe_worker.mesh.places import ExpertPlaces
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models import cuda_graph, cuda_runner
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.cuda_build import Sizes, prepare
from moe_worker.models.cuda_runner import CudaRunner
from moe_worker.models.deepseek import DeepseekModel, MoeBlock
from moe_worker.models.runner import Runner
from moe_worker.models.stage import Stage
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.moe.experts import Experts
from moe_worker.sampling.parameters import SamplingParameters

CONTEXT, PAGE, PREFILL_SEQUENCES = 512, 16, 64
FORMATS = {"bf16": "dense", "fp8": "fp8", "w4a16": "w4a16", "w4a8": "w4a8"}


class NoText:
    """Replaces the tokenizer: random weights generate no meaningful text."""

    def token_bytes(self, token: int) -> bytes:
        del token
        return b""


def part_of(model: DeepseekModel, stage: Stage) -> DeepseekModel:
    """What `stage` holds of a whole model."""
    layers = []
    for number in stage.layers:
        layer = model.layers[number]
        if isinstance(layer.block, MoeBlock) and number in stage.experts:
            experts, routed = layer.block.experts, model.config.moe.routed
            held = torch.tensor([*stage.experts[number], *range(routed, experts.count)], device=model.device)

            def kept(rows: torch.Tensor, held: torch.Tensor = held) -> torch.Tensor:
                return rows[held]

            own = Experts(experts.gate_up_AFD.map(kept), experts.down_ADI.map(kept), experts.round_tokens)
            layer = replace(layer, block=MoeBlock(layer.block.router, own, stage.dispatch(number)))
        layers.append(layer)
    none_ND = model.embedding_VD[:0]
    no_head = replace(model.head, matrix=model.head.matrix.map(lambda rows: rows[:0]))
    return replace(
        model,
        stage=stage,
        layers=layers,
        embedding_VD=model.embedding_VD if stage.first else none_ND,
        norm_D=model.norm_D if stage.last else none_ND[:, 0],
        head=model.head if stage.last else no_head,
    )


class Case:
    """A random model, as this rank's part of `member`'s mesh, and on the leader as a whole, too."""

    def __init__(  # noqa: PLR0913, PLR0917 - a record of sizes
        self, member: Member, values: dict[str, Any], number_format: str, device: torch.device, context: int,
        largest: int, pages: int, prefill: int, redundant: int = 0,
    ) -> None:  # fmt: skip
        self.config, self.member, self.context = config_of(values), member, context
        width, total = (
            Sizes.of(self.config.latent).cache_width(self.config.latent),
            len(range(values["num_hidden_layers"])),
        )
        cuts = [round(total * stage / member.shape.pipeline) for stage in range(member.shape.pipeline + 1)]
        layers = range(cuts[member.number], cuts[member.number + 1])
        places = ExpertPlaces(self.config, member.shape.expert, redundant)
        stage = stage_of(self.config, member, layers, places, device)

        def cache(count: int) -> PagedCache:
            return PagedCache.allocate(CacheShape(count, width, PAGE, torch.bfloat16), pages, device)

        with torch.inference_mode():
            whole = random_model(values, number_format, context, device)
            self.cache = cache(len(layers))
            part = CudaStage(part_of(whole, stage), self.cache, member.stage_group, largest, context, prefill)
            self.part = part
            self.runner = MeshRunner(member, part, self.cache, feeds=True)
            if member.leads:
                self.whole_cache = cache(total)
                self.alone = CudaRunner(
                    prepare(whole, consume=True), self.whole_cache, largest, context, prefill
                )

    def loaded(self) -> LoadedModel:
        """The mesh, for the leader's engine."""
        return self._loaded(self.runner, self.cache, self.member)

    def loaded_alone(self) -> LoadedModel:
        """The whole model in this process."""
        return self._loaded(self.alone, self.whole_cache, None)

    def _loaded(self, runner: Runner, cache: PagedCache, member: Member | None) -> LoadedModel:
        tokenizer = cast("Tokenizer", NoText())
        return LoadedModel(self.config, runner, tokenizer, cache, self.context, "random", (), member)

    @torch.inference_mode()
    def both(self, segments: list[Segment]) -> list[torch.Tensor]:
        """Logits of the last tokens of `segments`, by the mesh and by one process."""
        batch = Batch.of(segments, self.cache)
        ours = self.runner.logits(batch, self.cache, batch.last_rows).float().clone()
        self.runner.feed(ours.argmax(dim=-1))
        batch = Batch.of(segments, self.whole_cache)
        return [ours, self.alone.logits(batch, self.whole_cache, batch.last_rows).float().clone()]

    def end(self) -> None:
        """The other ranks stop following."""
        self.member.quiet()
        for channel in self.member.channels:
            channel.send(End())


def difference(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Of rows, relative: the median and the largest."""
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.median()), float(errors.max())


def random_tokens(count: int, seed: int, most: int) -> list[int]:
    return torch.randint(most, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compared(case: Case, prompt: int, steps: int) -> list[tuple[float, float]]:
    """Differences after prompts, of four sequences, and in each of `steps` decode steps."""
    shards, pages = case.member.shape.expert, case.cache.shape.pages_for(case.context)
    vocabulary = case.config.vocab_size
    texts = [random_tokens(prompt + n + steps, n, vocabulary) for n in range(4)]
    own = [list(range(n * pages, (n + 1) * pages)) for n in range(4)]
    found = [
        difference(*case.both([Segment(t[: prompt + n], 0, own[n], n % shards) for n, t in enumerate(texts)]))
    ]
    for step in range(steps):
        members = range(4) if step % 2 == 0 else range(1)  # the other shards have nothing to do
        at = [prompt + n + step for n in range(4)]
        if step % 2:
            at[0] = prompt + step
        segments = [Segment(texts[n][at[n] : at[n] + 1], at[n], own[n], n % shards) for n in members]
        found.append(difference(*case.both(segments)))
    return found


def engine(loaded: LoadedModel, options: EngineOptions, count: int, tokens: int) -> EngineCore:
    core = EngineCore(loaded, options)
    sampling = SamplingParameters(max_tokens=tokens, ignore_eos=True)
    for number in range(count):
        prompt = random_tokens(CONTEXT, number, loaded.config.vocab_size)
        core.submit(Request(number, tuple(prompt), sampling, seed=0))
    return core


def decode_ms(loaded: LoadedModel, options: EngineOptions, batch: int, tokens: int) -> float:
    """Milliseconds of a step, once all prompts have their first token."""
    core, seen = engine(loaded, options, batch, tokens), set[int]()
    while len(seen) < batch:
        seen |= {delta.id for delta in core.step()}
    torch.cuda.synchronize()
    begin, produced = time.perf_counter(), 0
    while not core.idle:
        produced += len(core.step())
    return (time.perf_counter() - begin) / (produced / batch) * 1e3


def prefill_rate(loaded: LoadedModel, options: EngineOptions) -> float:
    """Prompt tokens a second."""
    core = engine(loaded, options, PREFILL_SEQUENCES, 1)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while not core.idle:
        core.step()
    return PREFILL_SEQUENCES * CONTEXT / (time.perf_counter() - begin)


def kernel_ms(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds in NCCL's kernels, and in all kernels, while `work` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    rows = seen.key_averages()
    exchange = sum(each.device_time_total for each in rows if "nccl" in each.key.lower())
    return exchange / 1e3, sum(each.device_time_total for each in rows) / 1e3


def report(what: str, ours: float, baseline: float | None, unit: str, ratio: float | None = None) -> None:
    ratio = ratio or (ours / baseline if baseline else None)
    values = {"what": what, "ours": round(ours, 3), "baseline": baseline and round(baseline, 3),
              "ratio": ratio and round(ratio, 3), "unit": unit, "device": torch.cuda.get_device_name(),
              "simulated": False}  # fmt: skip
    print(json.dumps(values), flush=True)


def exchange_bytes(case: Case, batch: int) -> int:
    """That a rank sends to others in a decode step of `batch` sequences."""
    shape, config, int8 = case.member.shape, case.config, case.part.sends_int8
    per_shard = case.part.graphs.size_for(-(-batch // shape.expert))
    activations = config.hidden_size * (1 if int8 else 2) + (config.hidden_size // 128 * 4 if int8 else 0)
    row = activations + 8 * config.moe.routing.per_token + 2 * config.hidden_size
    layers = len([layer for layer in case.part.stage.layers if layer not in config.dense_layers])
    return (shape.expert - 1) * case.part.capacity(per_shard) * row * layers


def lead(case: Case, name: str, arguments: argparse.Namespace) -> None:
    """All measurements; rank 0 alone."""
    mesh = arguments.mesh
    for number, (median, worst) in enumerate(compared(case, 100, 6)):
        print(
            json.dumps(
                {"what": f"logits, mesh {mesh} {name}, pass {number}", "median": median, "worst": worst}
            ),
            flush=True,
        )
    options = EngineOptions(
        device="cuda", max_batch_size=max(*arguments.batch, PREFILL_SEQUENCES),
        prefill_tokens=arguments.prefill_tokens, prefix_cache=False, target_step_ms=10_000,
    )  # fmt: skip
    for batch in arguments.batch:
        ours, alone = (
            min(decode_ms(each, options, batch, arguments.tokens) for _ in range(arguments.rounds))
            for each in (case.loaded(), case.loaded_alone())
        )
        rate, other = batch / ours * 1e3, batch / alone * 1e3
        report(f"decode {name}, mesh {mesh}, batch {batch}", rate, other, "tokens/s")
        report(f"step {name}, mesh {mesh}, batch {batch}", ours, alone, "ms")
        core = engine(case.loaded(), options, batch, 24)
        while core.load.queued or core.load.running < batch:
            core.step()
        for _ in range(4):
            core.step()
        exchange, total = kernel_ms(lambda core=core: [core.step() for _ in range(8)])  # type: ignore[misc]
        report(
            f"NCCL kernels of rank 0, {name}, mesh {mesh}, batch {batch}",
            exchange / 8,
            total / 8,
            "ms a step",
        )
        while not core.idle:
            core.step()
        report(
            f"bytes to other ranks, {name}, mesh {mesh}, batch {batch}",
            exchange_bytes(case, batch),
            None,
            "bytes a step",
        )
    if not arguments.skip_prefill:
        found = [
            max(prefill_rate(each, options) for _ in range(3))
            for each in (case.loaded(), case.loaded_alone())
        ]
        report(f"prefill {name}, mesh {mesh}", found[0], found[1], "tokens/s")


def run_rank(arguments: argparse.Namespace) -> None:
    begin = time.perf_counter()
    device = torch.device("cuda", arguments.rank)
    options = EngineOptions(
        device=str(device), mesh=arguments.mesh, mesh_leader=arguments.address, mesh_rank=arguments.rank
    )
    member = join(options, "benchmark", device)
    most = max(*arguments.batch, PREFILL_SEQUENCES)
    values = LARGE | {"num_hidden_layers": arguments.layers}
    shards = member.shape.expert
    wanted = {1, 8, *arguments.batch, *(-(-batch // shards) for batch in arguments.batch), most}
    cuda_graph.batch_sizes = lambda largest: sorted(size for size in wanted if size <= largest)
    few = [size for size in cuda_runner.warm_sizes(4096) if size in {1, 128, 1024, 4096}]
    for module in (cuda_runner, sys.modules["moe_worker.mesh.cuda_stage"]):
        module.warm_sizes = lambda _: few  # type: ignore[attr-defined]
    context = CONTEXT + arguments.tokens + 32
    pages = most * -(-context // PAGE)
    case = Case(
        member, values, FORMATS[arguments.format], device, context, most, pages, arguments.prefill_tokens,
        arguments.redundant,
    )  # fmt: skip
    dist.barrier()
    if member.leads:
        print(f"ready after {time.perf_counter() - begin:.1f} s", flush=True)
        lead(case, arguments.format, arguments)
        case.end()
    else:
        case.runner.follow()
    torch.cuda.synchronize()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # captured exchanges would outlive their communicators


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", default="1x2")
    parser.add_argument("--format", default="w4a8", choices=list(FORMATS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--prefill-tokens", type=int, default=16384)
    parser.add_argument("--redundant", type=int, default=0)
    parser.add_argument("--skip-prefill", action="store_true")
    parser.add_argument("--rank", type=int, help="for the processes that this one starts")
    parser.add_argument("--address")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments)
        return
    pipeline, expert = map(int, arguments.mesh.split("x"))
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.gpu_mesh", *sys.argv[1:], "--address", address]
    environment = os.environ | {"MOE_WORKER_MESH_SECRET": "of a benchmark"}
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], env=environment)
        for rank in range(pipeline * expert)
    ]
    try:
        sys.exit(max(rank.wait() for rank in ranks))
    finally:
        for rank in ranks:
            rank.kill()


if __name__ == "__main__":
    main()
