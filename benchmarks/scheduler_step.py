"""The scheduler's own cost of a step, on one core, without a model.

    python -m benchmarks.scheduler_step [--sequences 256] [--steps 2000] [--json]

A step is one `plan` and one `complete`. "decode": all sequences run, none starts or ends. "serving": texts
constantly end and others start (prompts of 512 tokens, half of them shared, 128 new tokens). The baseline is
the budget of 1 ms for a step; a ratio below 1 is within it.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import time

from benchmarks.commands import at_least
from moe_worker.scheduler.core import Scheduler
from moe_worker.scheduler.plan import Arrival, Limits

BUDGET_MS = 1.0
PROMPT, SHARED, NEW = 512, 256, 128
WARM_UP = 300


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=at_least(16), default=256)
    parser.add_argument("--steps", type=at_least(100), default=2000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for load in ("decode", "serving"):
        samples_ms = measure(args.sequences, args.steps, ending=load == "serving")
        p99 = statistics.quantiles(samples_ms, n=100)[98]
        for name, figure in (("median", statistics.median(samples_ms)), ("p99", p99)):
            report(f"scheduler step, {args.sequences} running, {load}, {name}", figure, as_json=args.json)


def measure(sequences: int, steps: int, *, ending: bool) -> list[float]:
    """Milliseconds of each step. `ending`: texts end after NEW tokens at most, and others follow."""
    chance = random.Random(0)
    new_tokens = NEW if ending else steps + 2 * WARM_UP
    pages = sequences * ((PROMPT + new_tokens) // 16 + 2)
    scheduler = Scheduler(Limits(sequences, sequences, pages, prefill_tokens=2048, target_s=10.0))
    shared = [chance.choices(range(32_000), k=SHARED) for _ in range(8)]
    samples_ms: list[float] = []
    submitted, now = 0, 0.0
    # The collector should not traverse existing objects (modules, this benchmark's prompts) for the
    # scheduler.
    gc.collect()
    gc.freeze()
    while len(samples_ms) < WARM_UP + steps:
        while submitted < sequences or (ending and scheduler.waiting < 16):
            prompt = chance.choice(shared) + chance.choices(range(32_000), k=PROMPT - SHARED)
            length = chance.randint(NEW // 2, NEW) if ending else new_tokens
            scheduler.submit(Arrival(submitted, prompt, length, now))
            submitted += 1
        before = time.perf_counter()
        step = scheduler.plan(now).step
        planned = time.perf_counter()
        if step is None:
            raise SystemExit("nothing is left to schedule; give fewer --steps")
        tokens = [chance.randrange(32_000) for chunk in step.chunks if chunk.samples]
        now += 0.02
        resumed = time.perf_counter()
        scheduler.complete(step, tokens, now)
        elapsed = time.perf_counter() - resumed + planned - before
        samples_ms.append(1e3 * elapsed)
    return samples_ms[WARM_UP:]


def report(what: str, ours_ms: float, *, as_json: bool) -> None:
    line = {
        "what": what,
        "ours": round(ours_ms, 4),
        "peer": BUDGET_MS,
        "ratio": round(ours_ms / BUDGET_MS, 4),
        "unit": "ms",
        "device": f"{platform.machine()}, one core, Python {platform.python_version()}",
    }
    print(json.dumps(line) if as_json else f"{what}: {ours_ms:.3f} ms (budget {BUDGET_MS} ms)")


if __name__ == "__main__":
    main()
