"""Reads recorded traces: rates of intervals, or one row for each request."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import IO, Final

import numpy as np

from moe_operator.errors import MoEOperatorError
from moe_operator.scaling.forecast.past import Floats

_MINUTE_S: Final = 60.0
_LONGEST_S: Final = 3600.0
_MOST_STEPS: Final = 2_000_000
_INTERVAL_COLUMNS: Final = (("time", "t", "timestamp"), ("requests", "rate"))
_KINDS: Final = (
    "a CSV file with the columns time,requests or t,rate (one row an interval), a CSV file with TIMESTAMP,"
    "ContextTokens,GeneratedTokens (one row a request), or a JSONL file with timestamp (ms) or timestamp_us"
)


class TraceError(MoEOperatorError):
    """A trace cannot be read. The text names the line and what would be right."""


class Work(Enum):
    """What is counted."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True)
class Trace:
    """Work that arrived, in steps of equal length."""

    name: str
    start: float
    """Start of the first step, seconds since the epoch."""
    step_s: float
    """Length of a step: the fewest whole recorded intervals that take a minute or longer."""
    rates: Floats
    """Work per minute [steps]; NaN where nothing was recorded."""


@dataclass(frozen=True)
class _Row:
    at: float
    """Seconds."""
    work: float
    line: int


def read(path: Path, work: Work = Work.REQUESTS) -> Trace:
    """Reads a trace; .gz and .xz are unpacked.

    Raises:
        TraceError: it is none of the known kinds, or damaged, or too short.
    """
    lines = _lines(path)
    head = next(lines, "").strip().lstrip("\ufeff")
    if head.startswith("{"):
        return _binned(path, _jsonl_rows(path, head, lines, work))
    columns = [column.strip().lower() for column in head.split(",")]
    time, value = (next((name for name in names if name in columns), "") for names in _INTERVAL_COLUMNS)
    if time and value:
        if work is Work.TOKENS:
            raise TraceError(f"{path}: it records no tokens, only requests; leave out --work tokens")
        rows = _interval_rows(path, lines, len(columns), columns.index(time), columns.index(value))
        return _spaced(path, list(rows), per_second=value == "rate")
    if columns[0] == "timestamp" and len(columns) >= 3:
        return _binned(path, _request_rows(path, columns, lines, work))
    raise TraceError(f"{path}: its first line is {head[:60]!r}; a trace is {_KINDS}")


def _lines(path: Path) -> Iterator[str]:
    openers: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="") as text:
            yield from text
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: it is not text; a trace is {_KINDS}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"{path}: {reason}") from error


def _interval_rows(path: Path, lines: Iterable[str], columns: int, time: int, value: int) -> Iterator[_Row]:
    for number, row in enumerate(csv.reader(lines), start=2):
        if not row:
            continue
        if len(row) != columns:
            raise TraceError(f"{path}:{number}: {len(row)} columns; the first line names {columns}")
        yield _Row(_time(path, number, row[time]), _amount(path, number, row[value]), number)


def _request_rows(path: Path, columns: list[str], lines: Iterable[str], work: Work) -> Iterator[_Row]:
    for number, row in enumerate(csv.reader(lines), start=2):
        if not row:
            continue
        if len(row) != len(columns):
            raise TraceError(f"{path}:{number}: {len(row)} columns; the first line names {len(columns)}")
        count = sum(_amount(path, number, value) for value in row[1:3]) if work is Work.TOKENS else 1.0
        yield _Row(_time(path, number, row[0]), count, number)


def _jsonl_rows(path: Path, head: str, lines: Iterable[str], work: Work) -> Iterator[_Row]:
    for number, line in enumerate([head, *lines], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{path}:{number}: not JSON: {error}") from error
        yield _json_row(path, number, record, work)


def _json_row(path: Path, number: int, record: object, work: Work) -> _Row:
    if not isinstance(record, dict):
        raise TraceError(f"{path}:{number}: a line is one request: an object with a timestamp")
    for key, unit in (("timestamp", 1e-3), ("timestamp_us", 1e-6)):
        if key in record:
            at = _amount(path, number, record[key]) * unit
            break
    else:
        raise TraceError(f"{path}:{number}: neither timestamp (ms) nor timestamp_us is there")
    if work is Work.REQUESTS:
        return _Row(at, 1.0, number)
    if "input_length" not in record or "output_length" not in record:
        raise TraceError(
            f"{path}:{number}: input_length and output_length (tokens) are not there; leave out --work tokens"
        )
    tokens = _amount(path, number, record["input_length"]) + _amount(path, number, record["output_length"])
    return _Row(at, tokens, number)


def _time(path: Path, number: int, text: str) -> float:
    """Seconds since the epoch, of a number or a date and time (taken for UTC where it names no zone)."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(_microseconds(text.strip()))
    except ValueError as error:
        raise TraceError(
            f"{path}:{number}: {text!r} is no time; write seconds, or like 2024-05-12 00:00:10"
        ) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()  # noqa: UP017


def _microseconds(text: str) -> str:
    """Recorded times have seven digits behind the point; Python reads six."""
    whole, point, digits = text.partition(".")
    return whole + point + digits[:6].ljust(6, "0") if point and digits.isdigit() else text


def _amount(path: Path, number: int, value: object) -> float:
    try:
        amount = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        amount = math.nan
    if not math.isfinite(amount) or amount < 0:
        raise TraceError(f"{path}:{number}: {value!r} is not a number of 0 or more")
    return amount


def _spaced(path: Path, rows: list[_Row], *, per_second: bool) -> Trace:
    """Rows of equal intervals; those left out are unknown, several in a minute are added up."""
    if len(rows) < 2:
        raise TraceError(f"{path}: {len(rows)} rows; a trace has at least two")
    times = np.array([row.at for row in rows])
    gaps = np.diff(times)
    if (gaps <= 0).any():
        line = rows[int(np.argmax(gaps <= 0)) + 1].line
        raise TraceError(f"{path}:{line}: not later than the line before; rows are in order of time")
    interval = float(np.median(gaps))
    if interval > _LONGEST_S:
        raise TraceError(
            f"{path}: intervals of {interval:.0f} s; what replicas need within an hour cannot be told"
        )
    values = np.array([row.work for row in rows]) * (interval if per_second else 1.0)
    # Whole intervals, so that every step has as many: minutes where they divide one.
    rows_per_step = max(1, math.ceil(_MINUTE_S / interval - 1e-6))
    return _trace(path, times, values, interval * rows_per_step, rows_per_step)


def _binned(path: Path, rows: Iterator[_Row]) -> Trace:
    """Requests counted by minute from the first one on; a minute without any had none."""
    found = list(rows)
    if not found:
        raise TraceError(f"{path}: no requests")
    times = np.array([row.at for row in found], np.float64)
    work = np.array([row.work for row in found], np.float64)
    return _trace(path, times, work, _MINUTE_S, rows_per_step=0)


def _trace(path: Path, times: Floats, work: Floats, step: float, rows_per_step: int) -> Trace:
    """rows_per_step: rows that make a whole step, so that one with none of them is unknown; 0: any number."""
    start = math.floor(times.min() / step) * step if rows_per_step else float(times.min())
    index = ((times - start) / step).astype(np.int64)
    count = int(index.max()) + 1
    if count > _MOST_STEPS:
        raise TraceError(f"{path}: it spans {count * step / 86400:.0f} days; is one of its times wrong?")
    sums = np.bincount(index, work, count)
    rates: Floats = np.asarray(sums * _MINUTE_S / step, np.float64)
    if rows_per_step:
        rows = np.bincount(index, minlength=count)
        with np.errstate(invalid="ignore", divide="ignore"):
            # A minute of which some seconds are missing was as busy as the rest of it.
            rates = np.where(rows > 0, rates * np.maximum(rows_per_step / rows, 1), np.nan)
    elif count > 1:
        rates = rates[:-1]  # the last minute was not recorded whole
    return Trace(path.name, start, step, rates)
