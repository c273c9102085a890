"""Draws a run's loss and validation score over its steps."""

from __future__ import annotations

import math
from pathlib import Path

from moe_worker.files import replacing
from moe_worker.train.metrics import read_rows, scores


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Draws metrics.jsonl to a PNG: bits per token on the training text, bits per byte on valid."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second; only the end of a run draws

    rows = read_rows(metrics)
    losses = [(row["step"], row["loss"] / math.log(2)) for row in rows if "loss" in row]
    points = scores(rows)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel("bits per token, training text")
    if losses:
        axes.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=0.8)
    if points:
        right = axes.twinx()
        right.set_ylabel("bits per byte, validation text")
        right.plot(*zip(*points, strict=True), color="tab:orange", marker="o")
    with replacing(picture) as beside:
        figure.savefig(beside, dpi=120, format="png")
