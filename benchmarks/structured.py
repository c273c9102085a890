"""Decoding a batch with an output format; baseline: the same batch without one, in turn with it.

python -m benchmarks.structured [--model examples/docs-moe] [--batch 1 8 32] [--tokens 96] [--rounds 9]

Texts with the format are arrays of strings that do not end before --tokens. Each round runs both batches, in
turn; a ratio is the median of those of the rounds. `cpu` is the same of CPU seconds of all threads, without a
format by those with one, which other work on the machine changes less. `vocabulary` is the time that
llguidance takes to prepare the model's vocabulary, once for an engine.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.commands import at_least_two, positive, run
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.engine.requests import Request
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import SamplingParameters

STRINGS = {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 10_000}
FORMAT = OutputFormat("json_schema", json.dumps(STRINGS))
PROMPT = "The kernel maps a page when the process "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("examples/docs-moe"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=at_least_two, default=96)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = EngineOptions(device=arguments.device, max_batch_size=max(arguments.batch), max_queue=0)
    loaded = load(arguments.model, options, progress=False)
    line = (
        "batch {batch:3}: {formatted:8.1f} tokens/s with a format, {free:8.1f} without, ratio {ratio:.3f}"
        " ({lowest:.3f} to {highest:.3f}, median of {rounds} rounds), cpu {cpu:.3f}"
    )
    prepared = _prepare(loaded, options)
    print(json.dumps({"vocabulary_ms": prepared}) if arguments.json else f"vocabulary: {prepared:.0f} ms")
    for row in rows(loaded, options, arguments.batch, arguments.tokens, arguments.rounds):
        print(json.dumps(row) if arguments.json else line.format(**row), flush=True)


@dataclass(frozen=True)
class Speed:
    """Of one batch: tokens per second of all texts together, and CPU seconds of all threads for them."""

    rate: float
    cpu_s: float


def rows(
    loaded: LoadedModel, options: EngineOptions, batches: list[int], tokens: int, rounds: int
) -> Iterator[dict[str, float]]:
    for batch in batches:
        formatted: list[Speed] = []
        free: list[Speed] = []
        for number in range(rounds + 1):  # the first one warms up
            for is_formatted in (True, False) if number % 2 else (False, True):
                speed = _decode(loaded, options, batch, tokens, FORMAT if is_formatted else None)
                (formatted if is_formatted else free).append(speed)
        pairs = list(zip(formatted[1:], free[1:], strict=True))
        ratios = [one.rate / other.rate for one, other in pairs]
        yield {
            "batch": batch,
            "formatted": median(one.rate for one, _ in pairs),
            "free": median(other.rate for _, other in pairs),
            "ratio": median(ratios),
            "cpu": median(other.cpu_s / one.cpu_s for one, other in pairs),
            "lowest": min(ratios),
            "highest": max(ratios),
            "rounds": rounds,
        }


def _prepare(loaded: LoadedModel, options: EngineOptions) -> float:
    """Milliseconds that the first text with a format takes longer than the second one."""
    took = []
    for _ in range(2):
        began = time.perf_counter()
        _decode(loaded, options, 1, 3, FORMAT)
        took.append(time.perf_counter() - began)
    return (took[0] - took[1]) * 1e3


def _decode(
    loaded: LoadedModel, options: EngineOptions, batch: int, tokens: int, wanted: OutputFormat | None
) -> Speed:
    """The speed from the step in which the last of the texts began."""
    core = EngineCore(loaded, replace(options, max_batch_size=batch))
    prompt = tuple(loaded.tokenizer.encode(PROMPT))
    for number in range(batch):
        sampling = SamplingParameters(
            max_tokens=tokens, temperature=1.0, seed=number, ignore_eos=wanted is None
        )
        core.submit(Request(number, prompt, sampling, number, output_format=wanted))
    began: set[int] = set()
    ends: list[tuple[float, float]] = []
    while not core.idle:
        deltas = core.step()
        began.update(delta.id for delta in deltas)
        if len(began) == batch:
            ends.append((time.perf_counter(), time.process_time()))
    (began_s, cpu_began_s), (ended_s, cpu_ended_s) = ends[0], ends[-1]
    return Speed(batch * (len(ends) - 1) / (ended_s - began_s), cpu_ended_s - cpu_began_s)


if __name__ == "__main__":
    run(main)
