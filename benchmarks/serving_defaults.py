"""Latency and throughput by prefill_tokens and target_step_ms, from which serving defaults are chosen.

    PYTHONPATH=worker:protos:. python -m benchmarks.serving_defaults [--device cuda] [--format w4a8]
        [--prefill-tokens 512 2048 8192 16384] [--target-ms 10 25 50 10000] [--rates 4 16 32]
        [--prompt 1024] [--tokens 128] [--requests 128] [--batch 64] [--json]

Requests arrive at random (Poisson, the same for all settings) at `rate` a second, with prompts of PROMPT / 2
to 3 PROMPT / 2 random tokens. The engine runs alone in this process, with a random model: LARGE of
benchmarks/gpu_random.py on a GPU, SMALL in plain torch on a CPU. Nothing is cached. The baseline of each
figure is that of the first setting. "gap": the longest time between two tokens of each stream.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.commands import above_zero, at_least_two, need_gpu, positive, run
from benchmarks.gpu_random import LARGE, SMALL
from benchmarks.random_loaded import random_loaded
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.sampling.parameters import SamplingParameters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--format", default="w4a8")
    parser.add_argument("--prefill-tokens", type=positive, nargs="+", default=[2048, 512, 8192, 16384])
    parser.add_argument("--target-ms", type=above_zero, nargs="+", default=[50, 10, 25, 10_000])
    parser.add_argument("--rates", type=above_zero, nargs="+", default=[4, 16, 32], help="requests a second")
    parser.add_argument("--prompt", type=positive, default=1024)
    parser.add_argument("--tokens", type=at_least_two, default=128)
    parser.add_argument("--requests", type=at_least_two, default=128)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda":
        need_gpu(parser, "--device cpu tries the command with a small model")
    loaded = model(args)
    for rate in args.rates:
        first: dict[str, float] = {}
        for prefill, target in itertools.product(args.prefill_tokens, args.target_ms):
            options = EngineOptions(
                device=args.device, max_batch_size=args.batch, max_queue=args.requests, prefix_cache=False,
                prefill_tokens=prefill, target_step_ms=target,
            )  # fmt: skip
            figures = dict(measure(EngineCore(loaded, options), rate, args))
            first = first or figures
            for name, value in figures.items():
                what = f"{name}, {rate:g} requests/s, prefill_tokens {prefill}, target {target:g} ms"
                report(what, value, first[name], "tokens/s" if name == "throughput" else "ms", args)


def model(args: argparse.Namespace) -> LoadedModel:
    context = args.prompt * 3 // 2 + args.tokens + 1
    options = EngineOptions(args.device, max_batch_size=args.batch, prefill_tokens=max(args.prefill_tokens))
    return random_loaded(LARGE if args.device == "cuda" else SMALL, args.format, options, context)


@dataclass
class Stream:
    """When a request arrived, and when its tokens came; seconds."""

    arrived: float
    came: list[float] = field(default_factory=list)


def measure(core: EngineCore, rate: float, args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Milliseconds, and tokens a second."""
    waiting, streams = arrivals(core.vocab_size, rate, args), dict[int, Stream]()
    begin = time.perf_counter()
    while waiting or not core.idle:
        now = time.perf_counter() - begin
        while waiting and waiting[0][0] <= now:
            due, request = waiting.pop(0)
            streams[request.id] = Stream(due)
            core.submit(request)
        if core.idle:
            time.sleep(max(0.0, waiting[0][0] - now))
            continue
        deltas, now = core.step(), time.perf_counter() - begin
        for delta in deltas:
            streams[delta.id].came.append(now)
    first = [stream.came[0] - stream.arrived for stream in streams.values()]
    each = [(s.came[-1] - s.came[0]) / (len(s.came) - 1) for s in streams.values()]
    gaps = [max(b - a for a, b in itertools.pairwise(s.came)) for s in streams.values()]
    for name, values in (("time to first token", first), ("time per output token", each), ("gap", gaps)):
        cuts = statistics.quantiles(values, n=20)
        yield f"{name}, median", 1e3 * cuts[9]
        yield f"{name}, p95", 1e3 * cuts[18]
    yield "throughput", sum(len(stream.came) for stream in streams.values()) / now


def arrivals(vocabulary: int, rate: float, args: argparse.Namespace) -> list[tuple[float, Request]]:
    chance, at, found = random.Random(0), 0.0, []
    sampling = SamplingParameters(max_tokens=args.tokens, ignore_eos=True)
    for number in range(args.requests):
        at += chance.expovariate(rate)
        count = chance.randint(args.prompt // 2, args.prompt * 3 // 2)
        prompt = tuple(chance.choices(range(vocabulary), k=count))
        found.append((at, Request(number, prompt, sampling, seed=0)))
    return found


def report(what: str, ours: float, peer: float, unit: str, args: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    row = {"what": what, "ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ours / peer, 3)}
    row |= {"unit": unit, "device": device}
    print(json.dumps(row) if args.json else f"{what:90} {ours:10.2f} {unit}", flush=True)


if __name__ == "__main__":
    run(main)
