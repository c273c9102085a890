"""The quality gate: checks the loss of quality in a checkpoint's own report."""

import math
from pathlib import Path
from typing import Any

from moe_worker.config.directory import read_json
from moe_worker.errors import CheckpointError
from moe_worker.reading import present

QUALITY_FILE = "quality.json"


def check_quality(checkpoint: Path, most: float, text: str | None) -> None:
    """Raises CheckpointError if quality.json reports more than `most` additional bits per byte, or is
    invalid.

    `text`: the name of the text that must have been scored, if it matters.
    """
    path = checkpoint / QUALITY_FILE
    if not present(path):
        raise CheckpointError(
            f"quality gate: {path} does not exist; `moe-worker compress` writes it, or leave spec.quality out"
        )
    report = read_json(path)
    scores = report.get("bits_per_byte")
    before, after = (_number(scores, name) for name in ("before", "after"))
    if before is None or after is None:
        raise CheckpointError(
            f"quality gate: {path} must give bits_per_byte.before and bits_per_byte.after, two numbers"
        )
    if text is not None and report.get("text") != text:
        raise CheckpointError(
            f"quality gate: {path} is for the text {report.get('text')!r}; {text!r} is required"
        )
    if after - before > most:
        raise CheckpointError(
            f"quality gate: the checkpoint needs {after:.4f} bits per byte, its original {before:.4f}; that "
            f"is {after - before:.4f} more, and at most {most:g} are allowed"
        )


def _number(scores: Any, name: str) -> float | None:
    value = scores.get(name) if isinstance(scores, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
