"""Pages of the KV cache in CPU memory: what it takes to bring them back, and to compute them again.

    PYTHONPATH=worker:protos:. python -m benchmarks.kv_offload [--tokens 256 1024 4096 16384] [--small]
    python -m benchmarks.kv_offload --checkpoint DIRECTORY [--device cpu]
    python -m benchmarks.kv_offload --serve DIRECTORY [--device cuda] [--format w4a8] [--kv-memory 1400Mi]

The first form takes a random model in W4A8 on a GPU (--small: a small one, also on a CPU). Each prompt is
computed, all its pages are evicted, and it is sent again: time to first token with and without offload. Then
16 streams decode while pages leave. Each time is the median of some rounds, but "longest".

The second form sends four prompts in turns to a checkpoint whose cache holds one. The third sends 16 prompts
of 4,000 tokens in turns, and then all at once, to `moe-worker serve` with and without --kv-offload 16Gi; its
cache holds fewer than nine of them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import torch

from benchmarks.commands import need_gpu, positive, run
from benchmarks.gpu_random import LARGE, SMALL
from benchmarks.random_loaded import PAGE, random_loaded
from benchmarks.serving import running
from moe_api import transport
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.engine.requests import Request
from moe_worker.kvcache.offload import Move
from moe_worker.sampling.parameters import SamplingParameters

CONTEXT = 512
ROUNDS = 4
PROMPTS = [tuple(7 + (index * step) % 3000 for index in range(480)) for step in (1, 3, 5, 7)]
STREAMS = 16
DECODED = 100
SERVED_PROMPTS, SERVED_TOKENS, TURNS = 16, 4000, 3


def first_token_s(core: EngineCore, number: int, prompt: tuple[int, ...]) -> float:
    """Seconds to the first token of a request; runs it to its end."""
    core.submit(Request(number, prompt, SamplingParameters(max_tokens=2, ignore_eos=True), seed=0))
    began, first = time.perf_counter(), 0.0
    while not core.idle:
        if core.step() and not first:
            first = time.perf_counter() - began
    return first


def measure(checkpoint: Path, device: str, offload: int) -> str:
    options = EngineOptions(
        device=device, context_length=CONTEXT, threads=1, max_batch_size=1, kv_offload=offload
    )
    core = EngineCore(load(checkpoint, options, progress=False), options)
    times = [first_token_s(core, number, prompt) for number, prompt in enumerate(PROMPTS * ROUNDS)]
    median_ms = 1000 * statistics.median(times[len(PROMPTS) :])
    found = core.statistics
    return (
        f"offload {offload:>12} bytes   time to first token p50 {median_ms:7.1f} ms   "
        f"cached {found.prefix_hit_tokens} of {found.prompt_tokens} tokens   pages back {found.restored}"
    )


def serve(given: argparse.Namespace, offload: str) -> None:
    """Prints when first tokens come from a worker, one request at a time, and how long all at once take."""
    command = [sys.executable, "-m", "moe_worker", "serve", "--model", str(given.serve), "--listen"]
    command += ["127.0.0.1:0", "--device", given.device, "--format", given.format]
    command += ["--kv-memory", given.kv_memory, "--kv-offload", offload]
    chance = random.Random(0)
    prompts = [chance.choices(range(2, given.vocabulary), k=given.length) for _ in range(SERVED_PROMPTS)]
    with (
        running(command) as worker,
        grpc.insecure_channel(worker.address, options=transport.CLIENT_OPTIONS) as channel,
        ThreadPoolExecutor(SERVED_PROMPTS) as threads,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        def first_ms(prompt: list[int]) -> tuple[float, int]:
            """To the first token of eight; and how many tokens of the prompt were cached."""
            request = inference_pb2.GenerateRequest(
                prompt_tokens=inference_pb2.TokenIds(ids=prompt),
                sampling=inference_pb2.SamplingParameters(max_tokens=8, ignore_eos=True),
            )
            began, first, cached = time.perf_counter(), 0.0, 0
            for response in stub.Generate(request):
                first = first or 1000 * (time.perf_counter() - began)
                cached = max(cached, response.usage.cached_tokens)
            return first, cached

        for turn in range(TURNS + 1):
            found = [first_ms(prompt) for prompt in prompts]
            times, cached = zip(*found, strict=True)
            print(
                f"offload {offload}, turn {turn}: first token, median {statistics.median(times):.1f} ms, "
                f"longest {max(times):.1f} ms; cached {sum(cached)} of {len(prompts) * given.length} tokens",
                flush=True,
            )
        for _ in range(2):
            began = time.perf_counter()
            list(threads.map(first_ms, prompts))
            print(f"offload {offload}: all at once {time.perf_counter() - began:.3f} s", flush=True)


def evict(core: EngineCore) -> None:
    """Everything leaves the cache, and has arrived in CPU memory."""
    tree = core._scheduler._policy.memory.tree  # noqa: SLF001
    tree.evict(tree.idle)
    core.step()
    synchronize()
    core.step()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def returned(core: EngineCore, tokens: int, rounds: int, gone: Callable[[EngineCore], None]) -> float:
    """Median milliseconds to the first token of prompts that were computed before, and evicted by `gone`."""
    times, vocabulary = [], core.vocab_size
    for number in range(rounds):
        prompt = tuple((7 + tokens * 13 + number + index * 31) % vocabulary for index in range(tokens))
        first_token_s(core, 2 * number, prompt)
        gone(core)
        times.append(first_token_s(core, 2 * number + 1, prompt))
        gone(core)
    return 1000 * statistics.median(times)


def compare(loaded: LoadedModel, options: EngineOptions, lengths: Sequence[int], memory: int) -> None:
    """Prints the time to first token by length, and whether the worker itself would bring pages back."""
    kept = EngineCore(loaded, replace(options, kv_offload=memory))
    fresh = EngineCore(loaded, options)
    host = kept._host  # noqa: SLF001
    assert host is not None  # noqa: S101
    page_s, is_worth = host.page_s, kept._scheduler._policy._is_worth  # noqa: SLF001
    # Steps that take the same for all sizes say that computing costs nothing: here pages come back anyway.
    kept._scheduler._policy.memory._worth = lambda _: True  # noqa: SLF001
    print(f"a page comes back in {1e6 * page_s:.1f} us ({PAGE} tokens), measured at the start", flush=True)
    for tokens in lengths:
        host.page_s = 0.0
        before = kept.statistics
        back = returned(kept, tokens, ROUNDS, evict)
        pages = (kept.statistics.restored - before.restored) // ROUNDS
        host.page_s = page_s
        computed = returned(fresh, tokens, ROUNDS, evict)
        worker = "fetches" if is_worth((tokens - 1) // PAGE) else "computes"
        slope = 1e6 * PAGE * kept._scheduler.budget.prompts.per_token  # noqa: SLF001
        print(
            f"{tokens:6} tokens: {pages:5} pages come back {back:8.2f} ms   "
            f"computed again {computed:8.2f} ms   "
            f"a page of them {slope:7.1f} us   worker: {worker}",
            flush=True,
        )


def decode(loaded: LoadedModel, options: EngineOptions, memory: int) -> None:
    """Prints the time of a step of STREAMS streams while no, some and many pages leave or come back."""
    core = EngineCore(loaded, replace(options, kv_offload=memory))
    host = core._host  # noqa: SLF001
    assert host is not None  # noqa: S101
    for name, each, burst in (
        ("none", 0, 0), ("8 pages leave in each", 8, 0), ("32 pages leave in each", 32, 0),
        ("1,024 pages leave in one", 0, 1024), ("none", 0, 0),
    ):  # fmt: skip
        for number in range(STREAMS):
            prompt = tuple((number * 97 + index) % core.vocab_size for index in range(32))
            sampling = SamplingParameters(max_tokens=DECODED, ignore_eos=True)
            core.submit(Request(number, prompt, sampling, seed=0))
        times: list[float] = []
        hosts: list[float] = []
        saved = 0
        while not core.idle:
            leave = burst if len(times) == DECODED // 2 else each
            began = time.perf_counter()
            pages = loaded.cache.pages
            moves = [Move((saved + index) % host.slots, index % pages, saves=True) for index in range(leave)]
            host.run(moves)
            hosts.append(time.perf_counter() - began)
            saved += leave
            core.step()
            times.append(time.perf_counter() - began)
        steady = sorted(times[5:-2])
        print(
            f"step of {STREAMS} streams, {name}: median {1000 * statistics.median(steady):.3f} ms, "
            f"mean {1000 * statistics.mean(steady):.3f} ms, longest {1000 * steady[-1]:.3f} ms; "
            f"of it the host launches copies for {1000 * statistics.median(hosts):.3f} ms, "
            f"at most {1000 * max(hosts):.3f} ms",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--serve", type=Path, help="a checkpoint that a worker serves")
    parser.add_argument("--device", default="cpu", help="of the checkpoint")
    parser.add_argument("--format", default="auto", help="of the served checkpoint")
    parser.add_argument("--kv-memory", default="1400Mi", help="of the worker")
    parser.add_argument("--offload", nargs="+", default=["0", "16Gi"], help="CPU memory of each worker")
    parser.add_argument("--length", type=positive, default=SERVED_TOKENS, help="of the served prompts")
    parser.add_argument("--vocabulary", type=positive, default=100_000, help="of the served prompts")
    parser.add_argument("--tokens", nargs="+", type=positive, default=[256, 1024, 4096, 16384])
    parser.add_argument("--small", action="store_true", help="a small random model, also on a CPU")
    given = parser.parse_args()
    if given.checkpoint is not None:
        for offload in (0, 256 << 20):
            print(measure(given.checkpoint, given.device, offload), flush=True)
        return
    if given.serve is not None:
        for each in given.offload:
            serve(given, each)
        return
    if given.small:
        torch.set_num_threads(1)  # as the engine does for small models
    else:
        need_gpu(parser, "--small takes a small model on a CPU")
    options = EngineOptions("cuda" if torch.cuda.is_available() else "cpu", max_batch_size=STREAMS)
    context = max(given.tokens) + 64
    values = (SMALL if given.small else LARGE) | {"max_position_embeddings": 2 * context}
    loaded = random_loaded(values, "w4a8", options, context, context + STREAMS * 2 * DECODED)
    memory = (64 << 20) if given.small else (2 << 30)
    compare(loaded, options, given.tokens, memory)
    decode(loaded, options, memory)


if __name__ == "__main__":
    run(main)
