"""The cost of serving compared with the engine alone, and the gain of a cached prompt.

    python -m benchmarks.serving CHECKPOINT [--streams 64] [--prompt 64] [--tokens 64] [--rounds 3]
                                 [--long 4096] [--device auto] [--format auto] [--threads N] [--json]

"through gRPC": tokens per second of all streams through `moe-worker serve` over loopback; the baseline is the
engine in one process with the same requests. Rounds alternate, nothing is cached, medians are reported.
"cached": time to first token of a prompt of LONG tokens of which another request had the first 90 %; the
baseline is a prompt with nothing in common (LONG is limited by the model's context).
"""

import argparse
import asyncio
import contextlib
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from moe_api import transport
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.engine.requests import Request
from moe_worker.sampling.parameters import SamplingParameters

Prompts = list[tuple[int, ...]]


def main() -> None:
    args = arguments()
    options = EngineOptions(
        device=args.device,
        format=args.format,
        threads=args.threads,
        max_batch_size=args.streams,
        prefix_cache=False,
    )
    loaded = load(args.checkpoint, options, progress=False)
    bare, served = [], []
    with serving(args) as address:
        for number in range(args.rounds + 1):
            prompts = make_prompts(loaded, args.streams, args.prompt, seed=number)
            bare.append(bare_rate(loaded, options, prompts, args.tokens))
            served.append(asyncio.run(served_rate(address, prompts, args.tokens)))
    device = f"{loaded.device}, {platform.machine()}, {loaded.format}"
    what = f"through gRPC against the bare engine, {args.streams} streams"
    report(what, statistics.median(served[1:]), statistics.median(bare[1:]), "tok/s", device, args.json)
    cached, fresh = first_token_times(loaded, args.long, args.rounds)
    what = "time to first token, 90 % of the prompt cached, against none"
    report(what, 1e3 * cached, 1e3 * fresh, "ms", device, args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_prompts(loaded: LoadedModel, count: int, length: int, seed: int) -> Prompts:
    chance = random.Random(seed)
    return [tuple(chance.choices(range(loaded.config.vocab_size), k=length)) for _ in range(count)]


def bare_rate(loaded: LoadedModel, options: EngineOptions, prompts: Prompts, tokens: int) -> float:
    core = EngineCore(loaded, options)
    sampling = SamplingParameters(max_tokens=tokens, ignore_eos=True)
    began, produced = time.perf_counter(), 0
    for number, prompt in enumerate(prompts):
        core.submit(Request(number, prompt, sampling, seed=0))
    while not core.idle:
        produced += len(core.step())
    return produced / (time.perf_counter() - began)


async def served_rate(address: str, prompts: Prompts, tokens: int) -> float:
    async with grpc.aio.insecure_channel(address, options=transport.CLIENT_OPTIONS) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def stream(prompt: tuple[int, ...]) -> int:
            request = inference_pb2.GenerateRequest(
                prompt_tokens=inference_pb2.TokenIds(ids=prompt),
                sampling=inference_pb2.SamplingParameters(max_tokens=tokens, ignore_eos=True),
            )
            return sum([len(response.tokens) async for response in stub.Generate(request)])

        await channel.channel_ready()
        began = time.perf_counter()
        produced = sum(await asyncio.gather(*(stream(prompt) for prompt in prompts)))
        return produced / (time.perf_counter() - began)


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[str]:
    """A worker with the same options; its address."""
    command = [sys.executable, "-c", "from moe_worker.main import main; main()", "serve"]
    command += ["--model", str(args.checkpoint), "--listen", "127.0.0.1:0", "--device", args.device]
    command += ["--format", args.format, "--max-batch-size", str(args.streams), "--no-prefix-cache"]
    command += ["--threads", str(args.threads)] if args.threads else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            if process.stderr is None:
                raise SystemExit("the worker has no log")
            port, last = "", ""
            for line in process.stderr:
                last = line.strip() or last
                port = found[1] if (found := re.search(r"listening on port (\d+)", line)) else port
                if "INFO serving " in line:
                    break
            else:
                raise SystemExit(f"the worker ended before it served: {last}")
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def first_token_times(loaded: LoadedModel, long: int, rounds: int) -> tuple[float, float]:
    """Seconds with 90 % cached and with nothing, medians; rounds alternate."""
    length = min(long, loaded.context - 1)
    options = EngineOptions(max_batch_size=1, prefill_tokens=length)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        core = EngineCore(loaded, options)
        [first, other] = make_prompts(loaded, 2, length, seed=number)
        first_token(core, 0, first)
        times[0].append(first_token(core, 1, first[: length * 9 // 10] + other[length * 9 // 10 :]))
        times[1].append(first_token(core, 2, other))
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def first_token(core: EngineCore, number: int, prompt: tuple[int, ...]) -> float:
    began = time.perf_counter()
    core.submit(Request(number, prompt, SamplingParameters(max_tokens=1), seed=0))
    while not core.idle:
        core.step()
    return time.perf_counter() - began


def report(what: str, ours: float, peer: float, unit: str, device: str, as_json: bool) -> None:
    line = {"what": what, "ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ours / peer, 3)}
    if as_json:
        print(json.dumps(line | {"unit": unit, "device": device}))
    else:
        print(f"{what}: {ours:,.1f} against {peer:,.1f} {unit}, {ours / peer:.2f}x ({device})")


if __name__ == "__main__":
    main()
