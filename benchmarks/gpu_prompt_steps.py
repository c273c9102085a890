"""Milliseconds of one step with prompts on a GPU: as a CUDA graph, and launched kernel by kernel (baseline).

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_prompt_steps [--formats w4a8] [--rounds 20] [--json]

Random weights and distinct prompts, shape of DeepSeek-V2-Lite, 64 sequences at most, steps of up to 2,048
prompt tokens. A time is the median of single steps, from the batch on the host to the logits on the device;
"device" is the graph's part of it. Cached prefixes hold random values. Activated experts are counted per
layer.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.commands import need_gpu, positive
from benchmarks.gpu_decode import FORMATS, Bench, timed
from moe_worker.models.batch import Batch, Segment

CONTEXT, PROMPT_TOKENS, STREAMS = 4096, 2048, 64
SKIPPED = 3


class Case(NamedTuple):
    """Sequences of one step: each its new tokens and how many tokens are in the cache before them."""

    what: str
    sequences: list[tuple[int, int]]


CASES = [
    Case("256 tokens", [(256, 0)]),
    Case("512 tokens", [(512, 0)]),
    Case("1,024 tokens", [(1024, 0)]),
    Case("2,048 tokens", [(2048, 0)]),
    Case("32 prompts of 64 tokens", [(64, 0)] * 32),
    Case("400 tokens behind 3,600 cached ones", [(400, 3600)]),
    Case("1,024 tokens and 63 streams at 1,024", [(1, 1024)] * 63 + [(1024, 0)]),
    Case("256 tokens and 16 streams at 1,024", [(1, 1024)] * 16 + [(256, 0)]),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["w4a8"], choices=list(FORMATS))
    parser.add_argument("--rounds", type=positive, default=20, help="steps of which each time is the median")
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args()
    need_gpu(parser)
    for name in args.formats:
        bench = Bench.of(FORMATS[name], STREAMS, CONTEXT, PROMPT_TOKENS)
        with torch.inference_mode():
            for layer in bench.loaded.cache.layers:
                layer.normal_()  # what is behind the tokens of a step
            for case in CASES:
                measure(bench, name, case, args)


def measure(bench: Bench, name: str, case: Case, args: argparse.Namespace) -> None:
    """Prints the times of one step; captured and launched ones in turn."""
    runner, cache = bench.runner, bench.loaded.cache
    launched = replace(cache)  # the same memory, but not the cache that the graphs were recorded for
    batch = Batch.of(segments(bench, case), cache)
    size = runner.prompts.size(batch, batch.last_rows)
    if size is None:
        raise SystemExit(f"error: no graph fits {case.what}")
    counter = runner.expert_counter()
    runner.logits(batch, cache, batch.last_rows)
    active = statistics.mean(of_layer for _, _, of_layer in counter.read()[1])
    graph, one_by_one, device = [], [], []
    for _ in range(args.rounds + SKIPPED):
        graph.append(seconds(lambda: runner.logits(batch, cache, batch.last_rows)))
        one_by_one.append(seconds(lambda: runner.logits(batch, launched, batch.last_rows)))
        device.append(timed(lambda: runner.prompts.run(size)))
    ours, peer, alone = (1e3 * statistics.median(each[SKIPPED:]) for each in (graph, one_by_one, device))
    what = f"{name}, step of {case.what}, {active:.0f} activated experts"
    if args.json:
        row = {"what": what, "ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ours / peer, 3)}
        row |= {"device_ms": round(alone, 2), "unit": "ms", "device": torch.cuda.get_device_name()}
        print(json.dumps(row), flush=True)
        return
    print(
        f"{what:80} {ours:6.2f} ms (device {alone:.2f}), kernel by kernel {peer:6.2f}  {ours / peer:.2f}x",
        flush=True,
    )


def segments(bench: Bench, case: Case) -> list[Segment]:
    """Random tokens, on pages of their own."""
    generator, first, found = torch.Generator().manual_seed(0), 0, list[Segment]()
    for tokens, cached in case.sequences:
        pages = bench.loaded.cache.shape.pages_for(tokens + cached)
        drawn = torch.randint(bench.loaded.config.vocab_size, (tokens,), generator=generator)
        found.append(Segment(drawn.tolist(), cached, range(first, first + pages)))
        first += pages
    return found


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
