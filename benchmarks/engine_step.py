"""What the host does in a step of the engine, without a model: a GPU hides it while its own part is longer.

    python -m benchmarks.engine_step [--batch 1 16 64 256] [--steps 200] [--rounds 5] [--temperature 1]
        [--graphs] [--profile] [--json]

All streams decode, behind prompts of 512 tokens, with one step ahead as on a GPU; the runner returns prepared
logits. --graphs: it takes in batches as CudaRunner does for a captured step, on the CPU (needs triton).
"us": microseconds of CPU time of this thread, below which a tenth of the steps stay in the best round: other
processes disturb the rest. "operators": calls of torch operators a step; on a GPU most are a launch each.
"""

import argparse
import cProfile
import gc
import json
import platform
import pstats
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.commands import amount, at_least, positive
from benchmarks.gpu_random import SMALL, config_of
from moe_worker.bench.fusion import Operators
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.runner import Runner
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.sampling.parameters import SamplingParameters

CONTEXT, PAGE, WARM_UP = 512, 16, 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 16, 64, 256])
    parser.add_argument("--steps", type=at_least(10), default=200)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--temperature", type=amount, default=0.0, help="0: greedy")
    parser.add_argument("--graphs", action="store_true", help="fill the buffers of captured steps")
    parser.add_argument("--profile", action="store_true", help="which functions take the time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for batch in args.batch:
        found = min(step_us(engine(batch, args), args.steps) for _ in range(args.rounds))
        report(f"host's part of a step, batch {batch}", found, "us", args)
        report(
            f"operators of a step, batch {batch}", operators(engine(batch, args), args.steps), "calls", args
        )
        if args.profile:
            profile(engine(batch, args), args.steps)


class NoModel:
    """A Runner that returns prepared logits."""

    def __init__(self, batch: int, vocabulary: int) -> None:
        self.logits_NV = torch.randn(batch, vocabulary)

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        del batch, cache
        return self.logits_NV[: len(rows)]

    def expert_counter(self) -> "NoModel":
        return self

    def count(self, tokens: int) -> None:
        del tokens

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        return 0, []


class NoText:
    """Every token is a word."""

    def token_bytes(self, token: int) -> bytes:
        del token
        return b" word"


def no_graphs(batch: int, vocabulary: int, cache: PagedCache, context: int) -> Runner:
    """CudaRunner whose captured steps compute nothing, and whose prompts need no kernels."""
    from moe_worker.kernels.likeliest import likeliest  # noqa: PLC0415 - triton is not everywhere
    from moe_worker.models.cuda_graph import DecodeGraphs  # noqa: PLC0415
    from moe_worker.models.cuda_prompts import PromptGraphs, Size  # noqa: PLC0415
    from moe_worker.models.cuda_runner import CudaRunner  # noqa: PLC0415

    counts_LA = torch.zeros(1, 1, dtype=torch.int32)
    model: Any = SimpleNamespace(
        device=torch.device("cpu"), counts_LA=counts_LA, layers=(SimpleNamespace(router_ED=None),),
        empty_logits=lambda tokens: torch.randn(tokens, vocabulary), saved_by_expanding=lambda *_: 1.0,
    )  # fmt: skip

    class Captured(DecodeGraphs):
        def run(self, size: int) -> None:
            del size

    class CapturedPrompts(PromptGraphs):
        def run(self, size: Size) -> None:
            del size

    class Runs(CudaRunner):
        def _eager(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
            del batch, cache
            return self.graphs.logits_BV[: len(rows)]

    runner = Runs(model, cache, batch, context, 1)
    runner.graphs = Captured(model, cache, batch, context)
    runner.prompts = CapturedPrompts(model, runner.graphs, context, 1)
    for size in runner.graphs.sizes:
        runner.graphs._likeliest[size] = likeliest(runner.graphs.logits_BV[:size])  # noqa: SLF001
    return runner


def engine(batch: int, args: argparse.Namespace) -> EngineCore:
    """All streams have their first token."""
    config, context = config_of(SMALL), CONTEXT + args.steps + 4 * WARM_UP
    shape = CacheShape(1, 1, PAGE, torch.float32)
    cache = PagedCache.allocate(shape, batch * shape.pages_for(context), torch.device("cpu"))
    runner = cast("Runner", NoModel(batch, config.vocab_size))
    if args.graphs:
        runner = no_graphs(batch, config.vocab_size, cache, context)
    options = EngineOptions(
        device="cpu", max_batch_size=batch, prefill_tokens=16_384, prefix_cache=False, target_step_ms=10_000
    )
    loaded = LoadedModel(config, runner, cast("Tokenizer", NoText()), cache, context, "w4a8")
    core, seen = EngineCore(loaded, options, flights=2), set[int]()
    sampling = SamplingParameters(max_tokens=context - CONTEXT, ignore_eos=True, temperature=args.temperature)
    for number in range(batch):
        core.submit(Request(number, (7,) * CONTEXT, sampling, seed=number))
    while len(seen) < batch:
        seen |= {delta.id for delta in core.step()}
    for _ in range(WARM_UP):
        core.step()
    return core


def step_us(core: EngineCore, steps: int) -> float:
    """Microseconds of CPU time that a tenth of the steps stay below."""
    samples = []
    gc.collect()
    gc.freeze()
    for _ in range(steps):
        begin = time.thread_time_ns()
        core.step()
        samples.append(time.thread_time_ns() - begin)
    return statistics.quantiles(samples, n=10)[0] / 1e3


def operators(core: EngineCore, steps: int) -> float:
    seen = Operators()
    with seen:
        for _ in range(steps):
            core.step()
    return seen.count / steps


def profile(core: EngineCore, steps: int) -> None:
    seen = cProfile.Profile()
    seen.enable()
    for _ in range(steps):
        core.step()
    seen.disable()
    pstats.Stats(seen).sort_stats("tottime").print_stats(25)


def report(what: str, ours: float, unit: str, args: argparse.Namespace) -> None:
    what += ", as for captured steps" if args.graphs else ""
    what += f", temperature {args.temperature:g}" if args.temperature else ""
    line = {"what": what, "ours": round(ours, 1), "peer": None, "ratio": None, "unit": unit}
    line["device"] = f"{platform.machine()}, one core, Python {platform.python_version()}"
    print(json.dumps(line) if args.json else f"{what}: {ours:.1f} {unit}", flush=True)


if __name__ == "__main__":
    main()
