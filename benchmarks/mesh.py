"""Cost and balance of a mesh: what its exchanges take of a decode step on this machine's CPUs.

    python -m benchmarks.mesh [--model examples/docs-moe] [--meshes 1x1,1x2,2x1,2x2] [--json] [--short]

Each rank is a process with one thread, so more ranks than cores share them. A step is one token of every
sequence. Its baseline is the same model in one process (mesh 1x1), measured in the same run; those of the
exchange of tokens with their experts and of the computation are the step. Bytes are those of rank 0. A
pipeline is measured with one micro-batch, too. The bubble of a rank is the share of a step in which its
process uses no processor, which includes waiting for a busy one. With --rebalance, steps while experts move
are compared with those in between. Rows of balance are of benchmarks/mesh_balance.py, simulated ones of
benchmarks/mesh_model.py. --short measures few steps: it shows that all of this runs. Without --json the
baseline is in parentheses.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.commands import mesh_name, run
from benchmarks.mesh_balance import TEXTS, balance_rows
from benchmarks.mesh_model import simulated_rows
from benchmarks.mesh_running import BATCH, Moves, Steps, measure, measure_moves
from moe_worker.config.mesh import MeshShape

ONE_PROCESS = "1x1"
Row = dict[str, Any]


class Size(NamedTuple):
    """How much is measured. interval_s: between two rebalancings. windows: of recorded routing."""

    steps: int
    rounds: int
    tokens: int
    interval_s: float
    windows: int


FULL, SHORT = Size(100, 8, 150, 1.0, 12), Size(8, 2, 40, 0.1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "examples" / "docs-moe")
    parser.add_argument(
        "--meshes", type=mesh_names, default=[ONE_PROCESS, "1x2", "2x1", "2x2"], metavar="1x2,2x1,..."
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--rebalance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure steps while experts move",
    )
    parser.add_argument(
        "--balance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="simulate how evenly experts load ranks",
    )
    parser.add_argument("--short", action="store_true", help="few steps")
    given = parser.parse_args()
    size = SHORT if given.short else FULL
    show(load_row("before"), given.json)
    for each in measured(given.model, given.meshes, size.steps):
        show(each, given.json)
    if given.rebalance:
        for each in moves_rows(measure_moves(given.model, size.rounds, size.tokens, size.interval_s)):
            show(each, given.json)
    show(load_row("after"), given.json)
    for each in balance_rows(given.model, TEXTS, size.windows) if given.balance else ():
        show(each, given.json)
    for each in simulated_rows():
        show(each, given.json)


def mesh_names(text: str) -> list[str]:
    return [mesh_name(each) for each in text.split(",")]


def show(row: Row, as_json: bool) -> None:
    baseline = "" if row["baseline"] is None else f" ({row['baseline']:.4g})"
    text = f"{row['what']}: {row['ours']:.4g}{baseline} {row['unit']}"
    print(json.dumps(row) if as_json else text, flush=True)


def row(what: str, ours: float, baseline: float | None, unit: str) -> Row:
    """A figure of this machine."""
    ratio = ours / baseline if baseline else None
    return {
        "what": what, "ours": ours, "baseline": baseline, "ratio": ratio, "unit": unit, "device": "cpu",
        "simulated": False,
    }  # fmt: skip


def load_row(when: str) -> Row:
    """What else this machine does."""
    what = f"load average of the last minute, {when} the measurements of steps; baseline: cores"
    return row(what, os.getloadavg()[0], os.cpu_count() or 1, "processes")


def measured(model: Path, meshes: list[str], steps: int) -> Iterator[Row]:
    """Figures of each mesh, as soon as they are there."""
    baseline = measure(model, ONE_PROCESS, steps)
    for mesh in meshes:
        found = baseline if mesh == ONE_PROCESS else measure(model, mesh, steps)
        yield from step_rows(mesh, found, baseline)
        if MeshShape.parse(mesh).pipeline > 1:
            yield from pipeline_rows(mesh, found, measure(model, mesh, steps, micro_batches=1))


def step_rows(mesh: str, found: Steps, baseline: Steps) -> Iterator[Row]:
    """Of one mesh; the baseline of a step is one process."""
    step, exchange = found.step_s * 1e3, found.exchange_s * 1e3
    yield row(f"decode step of {BATCH} sequences, mesh {mesh}", step, baseline.step_s * 1e3, "ms")
    yield row(f"exchange of tokens in a step, mesh {mesh}", exchange, step, "ms")
    yield row(f"rest of a step (computation), mesh {mesh}", step - exchange, step, "ms")
    yield row(f"bytes to experts of other ranks in a step, mesh {mesh}", found.sent_bytes, None, "bytes")
    yield row(f"bytes to the next stage in a step, mesh {mesh}", found.forwarded_bytes, None, "bytes")
    yield row(f"bytes from the last stage in a step, mesh {mesh}", found.collected_bytes, None, "bytes")


def pipeline_rows(mesh: str, found: Steps, whole: Steps) -> Iterator[Row]:
    """Of one mesh; the baseline is one micro-batch."""
    what = f"micro-batches for each of the stages, mesh {mesh}"
    yield row(
        f"decode step of {BATCH} sequences, {what}; baseline: one micro-batch", found.step_s * 1e3,
        whole.step_s * 1e3, "ms",
    )  # fmt: skip
    for rank, (ours, before) in enumerate(zip(found.bubbles, whole.bubbles, strict=True)):
        yield row(
            f"bubble of rank {rank}, {what}; baseline: one micro-batch", ours, before, "share of a step"
        )


def moves_rows(found: Moves) -> Iterator[Row]:
    """Steps while experts move; the baseline is those in between."""
    moving, still = ([seconds * 1e3 for seconds in each] for each in (found.moving, found.still))
    what = (
        f"step of {BATCH} sequences while experts move, mesh 1x2, {found.rebalancings} rebalancings, "
        f"{len(moving)} steps; baseline:"
    )
    normal = statistics.median(still)
    yield row(f"median {what} median in between", statistics.median(moving), normal, "ms")
    yield row(
        f"99th percentile {what} 99th percentile in between", percentile(moving), percentile(still), "ms"
    )
    yield row(f"worst {what} worst in between", max(moving), max(still), "ms")
    yield row(f"worst {what} median in between", max(moving), normal, "ms")


def percentile(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * 99 // 100)]


if __name__ == "__main__":
    run(main)
