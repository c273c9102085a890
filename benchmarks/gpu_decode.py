"""Decode and prefill of the engine on a GPU, with vLLM as the baseline; one shape, context 512.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_decode [--formats bf16 w4a8] [--batch 1 16 64 256]
        [--tokens 128] [--rounds 5] [--temperature 1 [--top-p 0.95] [--top-k 50]] [--profile] [--launches]
        [--host] [--json]

Needs torch, triton, numpy, safetensors, tokenizers and tqdm; with nvidia-ml-py it reports tokens per joule of
the whole card, too. Weights are random, so only speed is compared. A
figure is that of the whole engine (scheduler, model and sampling); `graph only` is the device's part of it.
The baseline is vLLM 0.26 in the same format (its bf16 for w4a8, and for s14, which is w4a8 with 1:4 sparse
layers), measured on one H200 with prompts that differ; on another card the ratio says little.
"""

import argparse
import cProfile
import importlib
import json
import math
import pstats
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_random import LARGE, NO_TEXT, random_model
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.cuda import CudaModel
from moe_worker.models.cuda_build import prepare
from moe_worker.models.cuda_graph import DecodeGraphs
from moe_worker.models.cuda_runner import CudaRunner
from moe_worker.sampling.parameters import SamplingParameters

# vLLM 0.26 on one H200, 2026-11-29 (CUDA graphs, FLASH_ATTN_MLA, Triton MoE; W4A16 by Marlin): tokens a
# second by batch size (51, 64 and 64 of 64 experts activated at 16, 64 and 256), and of prefill (batch 0).
BASELINES = {
    "bf16": {1: 314.8, 16: 1_970, 64: 6_220, 256: 20_297, 0: 89_000},
    "fp8": {1: 315.2, 16: 2_712, 64: 8_776, 256: 23_477, 0: 118_000},
    "w4a16": {1: 256.0, 16: 2_719, 64: 8_679, 0: 63_000},
}
BASELINE_OF = {"bf16": "bf16", "fp8": "fp8", "w4a16": "w4a16", "w4a8": "bf16", "s14": "bf16"}
PAGE = 16
CONTEXT = 512
PREFILL_SEQUENCES = 64
KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
FORMATS = {"bf16": "dense", "fp8": "fp8", "w4a16": "w4a16", "w4a8": "w4a8", "s14": "s14"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["bf16", "w4a8"], choices=list(FORMATS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill-tokens", type=int, default=16384, help="prompt tokens of one step")
    parser.add_argument("--kv-dtype", default="bf16", choices=list(KV_DTYPES), help="of the KV cache")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--host", action="store_true", help="what the host does in a decode step")
    parser.add_argument("--launches", action="store_true", help="kernel launches of one layer and token")
    parser.add_argument("--skip-prefill", action="store_true")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: all tokens")
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--same-prompt", action="store_true", help="identical prompts: few activated experts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in args.formats:
        for row in measure(name, args):
            report(row, args)


@dataclass(frozen=True)
class Bench:
    """A random model with room for the largest batch."""

    model: CudaModel
    loaded: LoadedModel
    options: EngineOptions
    graphs: DecodeGraphs

    @classmethod
    def of(
        cls, number_format: str, batch: int, context: int, prefill_tokens: int,
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> "Bench":  # fmt: skip
        device = torch.device("cuda")
        with torch.inference_mode():
            plain = random_model(LARGE, number_format, context, device)
            config, model = plain.config, prepare(plain)
            del plain
            torch.cuda.empty_cache()
            shape = CacheShape(config.num_hidden_layers, config.attention.cache_width, PAGE, kv_dtype)
            cache = PagedCache.allocate(shape, batch * shape.pages_for(context), device)
            runner = CudaRunner(model, cache, batch, context, prefill_tokens, progress=True)
        options = EngineOptions(
            device="cuda", max_batch_size=batch, prefill_tokens=prefill_tokens, prefix_cache=False,
            target_step_ms=10_000,
        )  # fmt: skip
        loaded = LoadedModel(config, runner, NO_TEXT, cache, context, number_format, ())
        return cls(model, loaded, options, runner.graphs)


def measure(name: str, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    most, context = max(*args.batch, PREFILL_SEQUENCES), CONTEXT + args.tokens
    bench = Bench.of(FORMATS[name], most, context, args.prefill_tokens, KV_DTYPES[args.kv_dtype])
    if args.launches:
        yield row(f"launches a layer, {name}", launches_per_layer(bench), None, "kernels")
    for batch in args.batch:
        measured = [decode_rate(bench, batch, args) for _ in range(args.rounds)]
        rate, active = (statistics.median(each) for each in list(zip(*measured, strict=True))[:2])
        baseline = None if args.same_prompt else BASELINES[BASELINE_OF[name]].get(batch)
        how = "".join(
            f", {name} {getattr(args, name):g}" for name in GREEDY if getattr(args, name) != GREEDY[name]
        )
        yield row(f"decode {name}, batch {batch}, {active:.0f} activated experts{how}", rate, baseline)
        yield from efficiency(
            f"decode {name}, batch {batch}", [(each.tokens, each.joules) for each in measured]
        )
        yield row(f"decode {name}, batch {batch}, graph only", graph_rate(bench, batch, args), None)
        if args.host:
            yield from host_share(bench, batch, args, f"decode {name}, batch {batch}")
    if not args.skip_prefill:
        prefill_rate(bench)
        before = joules()
        rate = statistics.median(prefill_rate(bench) for _ in range(args.rounds))
        spent = joules() - before
        yield row(f"prefill {name}", rate, BASELINES[BASELINE_OF[name]][0])
        yield from efficiency(f"prefill {name}", [(PREFILL_SEQUENCES * CONTEXT * args.rounds, spent)])
        if args.profile:
            print_profile("prefill", lambda: prefill_rate(bench))


def row(what: str, ours: float, baseline: float | None, unit: str = "tokens/s") -> dict[str, object]:
    return {
        "what": what,
        "ours": round(ours, 1),
        "peer": baseline,
        "ratio": round(ours / baseline, 3) if baseline else None,
        "unit": unit,
        "device": torch.cuda.get_device_name(),
    }


def submitted(bench: Bench, count: int, tokens: int, same: bool = False, **chosen: Any) -> EngineCore:
    """An engine with `count` random prompts of CONTEXT tokens, or the same one for all."""
    core, generator = EngineCore(bench.loaded, bench.options), torch.Generator().manual_seed(0)
    sampling = SamplingParameters(max_tokens=tokens, ignore_eos=True, **chosen)
    for number in range(count):
        if number == 0 or not same:
            prompt = torch.randint(bench.loaded.config.vocab_size, (CONTEXT,), generator=generator)
        core.submit(Request(number, tuple(prompt.tolist()), sampling, seed=number))
    return core


class Decoded(NamedTuple):
    """Tokens per second, activated routed experts of a layer, tokens, joules of the card (NaN: unknown)."""

    rate: float
    active: float
    tokens: int
    joules: float


def joules() -> float:
    """What the card has used since the driver was loaded; NaN without nvidia-ml-py."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return math.nan
    pynvml.nvmlInit()
    # CUDA numbers only the visible cards, NVML all of them.
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(card)) / 1e3


def efficiency(what: str, used: Sequence[tuple[int, float]]) -> Iterator[dict[str, object]]:
    """A row of tokens per joule, of runs with so many tokens and joules; none where joules are unknown."""
    tokens, spent = (sum(each) for each in zip(*used, strict=True))
    if spent > 0:
        yield row(f"{what}, per joule of the card", tokens / spent, None, "tokens/J")


def decoding(bench: Bench, batch: int, args: argparse.Namespace) -> EngineCore:
    """An engine whose streams all have their first token."""
    chosen = {name: getattr(args, name) for name in GREEDY}
    core, seen = submitted(bench, batch, args.tokens, args.same_prompt, **chosen), set[int]()
    while len(seen) < batch:
        seen |= {delta.id for delta in core.step()}
    return core


def decode_rate(bench: Bench, batch: int, args: argparse.Namespace) -> Decoded:
    """Decode after all prompts have their first token."""
    core = decoding(bench, batch, args)
    before, energy = core.expert_statistics, joules()
    begin, produced = time.perf_counter(), 0
    while not core.idle:
        produced += len(core.step())
    seconds, energy = time.perf_counter() - begin, joules() - energy
    used = core.expert_statistics.since(before)
    active = statistics.mean(layer.active for layer in used.layers) / used.steps
    return Decoded(produced / seconds, active, produced, energy)


def host_share(bench: Bench, batch: int, args: argparse.Namespace, what: str) -> Iterator[dict[str, object]]:
    """Microseconds of a step in which the host computes, and waits for the device; prints a profile.

    A host that hardly waits limits the step.
    """
    inner, wait_s = torch.cuda.Event.synchronize, 0.0

    def timed(event: torch.cuda.Event) -> None:
        nonlocal wait_s
        begin = time.perf_counter()
        inner(event)
        wait_s += time.perf_counter() - begin

    def step(core: EngineCore) -> tuple[float, float]:
        nonlocal wait_s
        wait_s, begin = 0.0, time.perf_counter()
        core.step()
        return time.perf_counter() - begin - wait_s, wait_s

    steps, core = args.tokens // 2, decoding(bench, batch, args)
    with unittest.mock.patch.object(torch.cuda.Event, "synchronize", timed):
        computes, waits = zip(*(step(core) for _ in range(steps)), strict=True)
    yield row(f"{what}, host computes", 1e6 * statistics.median(computes), None, "us")
    yield row(f"{what}, host waits", 1e6 * statistics.median(waits), None, "us")
    core, seen = decoding(bench, batch, args), cProfile.Profile()
    seen.enable()
    for _ in range(steps):
        core.step()
    seen.disable()
    pstats.Stats(seen).sort_stats("tottime").print_stats(25)


def prefill_rate(bench: Bench) -> float:
    """Prompt tokens a second."""
    core = submitted(bench, PREFILL_SEQUENCES, 1)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while not core.idle:
        core.step()
    return PREFILL_SEQUENCES * CONTEXT / (time.perf_counter() - begin)


@torch.inference_mode()
def graph_rate(bench: Bench, batch: int, args: argparse.Namespace) -> float:
    """Tokens per second of the captured step alone, at the context at which decode starts."""
    graphs, cache = bench.graphs, bench.loaded.cache
    per_sequence = cache.shape.pages_for(bench.loaded.context)
    tokens = torch.randint(bench.loaded.config.vocab_size, (batch,)).tolist()
    segments = [
        Segment([token], CONTEXT, range(number * per_sequence, (number + 1) * per_sequence))
        for number, token in enumerate(tokens)
    ]
    size = graphs.fill(Batch.of(segments, cache))

    def steps() -> None:
        for _ in range(32):
            graphs.run(size)

    steps()
    seconds = statistics.median(timed(steps) for _ in range(args.rounds)) / 32
    if args.profile:
        print_profile(f"decode step, batch {batch}", lambda: graphs.run(size))
    return batch / seconds


def timed(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def print_profile(title: str, work: Callable[[], object]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda each: -each.device_time_total)
    total = sum(each.device_time_total for each in rows)
    print(f"--- {title}: {total / 1e3:.3f} ms in kernels")
    for each in rows[:16]:
        mean = each.device_time_total / each.count
        print(f"{each.device_time_total / 1e3:9.3f} ms {each.count:5d} x {mean:8.1f} us  {each.key[:70]}")


def launches_per_layer(bench: Bench) -> int:
    """Kernels of a decode step with three layers minus those of a step with two."""
    counts: list[int] = []
    for layers in (2, 3):
        part = replace(bench.model, layers=bench.model.layers[:layers])
        cache = replace(bench.loaded.cache, layers=bench.loaded.cache.layers[:layers])
        graphs = DecodeGraphs(part, cache, 16, bench.loaded.context)
        with (
            torch.inference_mode(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen,
        ):
            graphs.run(16)
            torch.cuda.synchronize()
        kernels = (each for each in seen.key_averages() if each.device_time_total)
        counts.append(sum(each.count for each in kernels))
    return counts[1] - counts[0]


def report(values: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(values), flush=True)
        return
    baseline = "" if values["peer"] is None else f"  vLLM {values['peer']:g}  {values['ratio']}x"
    print(f"{values['what']:44} {values['ours']:>12} {values['unit']}{baseline}", flush=True)


if __name__ == "__main__":
    main()
