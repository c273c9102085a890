"""How evenly experts load the ranks of a stage: placed by one window of tokens, measured on the next one.

    python -m benchmarks.mesh_balance [--json] [--model examples/docs-moe] [--text FILE...]

Balance is the mean load of the ranks over the largest, 1 at best; figures are means over layers and
windows. The baseline has no copies of experts and the order of the checkpoint. Loads of `synthetic` rows
are drawn: 64 experts whose popularity is log-normal (sigma 0.8) and drifts by 5 % from window to window,
32,768 choices in each. Those of `recorded` rows are choices of the model's routers on texts, in windows
of 2,048 tokens.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.commands import run
from moe_worker.mesh.placement import Topology, imbalance, placement

ROOT = Path(__file__).parents[1]
TEXTS = sorted((ROOT / "docs").glob("*.md"))
MOST_WINDOWS = 12
Window = Sequence[Sequence[float]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "docs-moe")
    parser.add_argument("--text", type=Path, nargs="*", default=TEXTS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for each in balance_rows(arguments.model, arguments.text):
        print(json.dumps(each) if arguments.json else f"{each['what']}: {each['ours']} ({each['baseline']})")


def balance_rows(
    model: Path, texts: Sequence[Path], most_windows: int = MOST_WINDOWS
) -> Iterator[dict[str, Any]]:
    """All figures; recorded ones of `most_windows` windows."""
    synthetic = list(drawn_windows(random.Random(0), layers=16, windows=8, experts=64))
    for copies in (0, 8):
        yield row("synthetic, 64 experts", synthetic, 8, copies)
    recorded = list(recorded_windows(model, texts, most_windows))
    for ranks, copies in ((2, 0), (2, 2), (4, 0), (4, 4), (8, 0), (8, 8)):
        yield row(f"recorded routing of {model.name}", recorded, ranks, copies)


def row(what: str, windows: Sequence[Window], ranks: int, copies: int) -> dict[str, Any]:
    """One figure. windows: the loads [L, E] of each."""
    ours, baseline = balance(windows, ranks, copies), balance(windows, ranks, None)
    return {
        "what": f"balance on the next window, {what}, {ranks} ranks, {copies} copies",
        "ours": round(ours, 4), "baseline": round(baseline, 4), "ratio": round(ours / baseline, 3),
        "unit": "mean / max", "device": "cpu", "simulated": what.startswith("synthetic"),
    }  # fmt: skip


def balance(windows: Sequence[Window], ranks: int, copies: int | None) -> float:
    """Mean over layers and windows but the first. copies: None for the checkpoint's order without any."""
    found = []
    for before, after in pairwise(windows):
        places = [tuple(range(len(before[0])))] * len(before)
        if copies is not None:
            places = placement(before, Topology(ranks), copies)
        pairs = zip(after, places, strict=True)
        found += [1 / imbalance(loads, own, ranks) for loads, own in pairs]
    return statistics.mean(found)


def drawn_windows(draw: random.Random, layers: int, windows: int, experts: int) -> Iterator[Window]:
    """Counts of choices by layer and expert."""
    popularity = [[math.exp(draw.gauss(0, 0.8)) for _ in range(experts)] for _ in range(layers)]
    for _ in range(windows):
        popularity = [[each * math.exp(draw.gauss(0, 0.05)) for each in row] for row in popularity]
        chosen = [draw.choices(range(experts), row, k=32768) for row in popularity]
        yield [[float(own.count(expert)) for expert in range(experts)] for own in chosen]


def recorded_windows(model: Path, texts: Sequence[Path], most_windows: int) -> Iterator[Window]:
    """Counts of choices by layer and expert, of the texts one behind the other."""
    # Only these need a model.
    from benchmarks.mesh_recorded import Recorder  # noqa: PLC0415

    recorder = Recorder(model, texts)
    return (recorder.counts(number) for number in range(min(most_windows, recorder.windows)))


if __name__ == "__main__":
    run(main)
