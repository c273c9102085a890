"""Draws a run's loss and validation score over its steps."""

from __future__ import annotations

import json
import math
from pathlib import Path


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Draws metrics.jsonl to a PNG: bits per token on the training text, bits per byte on valid."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second; only the end of a run draws

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [(row["step"], row["loss"] / math.log(2)) for row in rows if "loss" in row]
    scores = [
        (row["step"], row["valid_bits_per_byte"])
        for row in rows
        if row.get("valid_bits_per_byte") is not None
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel("bits per token, training text")
    if losses:
        axes.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=0.8)
    if scores:
        right = axes.twinx()
        right.set_ylabel("bits per byte, validation text")
        right.plot(*zip(*scores, strict=True), color="tab:orange", marker="o")
    figure.savefig(picture, dpi=120)
