"""metrics.jsonl: what a run showed while it went on, one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_worker.errors import DataError
from moe_worker.files import append_text, write_text

METRICS_FILE = "metrics.jsonl"
Row = dict[str, Any]


def record(file: Path, row: Row) -> None:
    """Adds a row. Raises WorkerError where the disk takes none."""
    append_text(file, json.dumps(row) + "\n")


def read_rows(file: Path) -> list[Row]:
    """All rows; one at the end that was cut off while it was written is left out.

    Raises DataError where another line is none of ours.
    """
    if not file.exists():
        return []
    *whole, _unfinished = file.read_text().split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise DataError(f"{file} contains a line that is not JSON ({error}); remove that line") from error


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Replaces the file."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def scores(rows: Iterable[Row]) -> list[tuple[int, float]]:
    """Steps, and the bits per byte on the validation text behind them."""
    found = ((row["step"], row.get("valid_bits_per_byte")) for row in rows)
    return [(step, score) for step, score in found if score is not None]
