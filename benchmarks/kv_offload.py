"""Time to first token of prompts that the KV cache evicts, with and without KV offload to CPU memory.

`python -m benchmarks.kv_offload CHECKPOINT [--device cpu]`: four prompts in turns; the cache holds one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Request
from moe_worker.sampling.parameters import SamplingParameters

CONTEXT = 512
ROUNDS = 4
PROMPTS = [tuple(7 + (index * step) % 3000 for index in range(480)) for step in (1, 3, 5, 7)]


def first_token_s(core: EngineCore, number: int, prompt: tuple[int, ...]) -> float:
    """Seconds to the first token of a request; runs it to its end."""
    core.submit(Request(number, prompt, SamplingParameters(max_tokens=2), seed=0))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    for offload in (0, 256 << 20):
        print(measure(given.checkpoint, given.device, offload), flush=True)


if __name__ == "__main__":
    main()
