"""metrics.jsonl: metrics of a run in progress, one object per line."""

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
    """Appends a row. Raises WorkerError if the disk is full."""
    append_text(file, json.dumps(row) + "\n")


def read_rows(file: Path) -> list[Row]:
    """All rows; an incomplete last row is dropped.

    Raises DataError if another line is not valid.
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
    """Steps, and their bits per byte on the validation text."""
    found = ((row["step"], row.get("valid_bits_per_byte")) for row in rows)
    return [(step, score) for step, score in found if score is not None]
