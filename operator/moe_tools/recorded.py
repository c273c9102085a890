"""Reads recorded traces: one row for each interval, or one row for each request.

CSV, or JSON lines, plain or compressed (.gz, .xz). Columns are found by their names, in any case:

    time,requests           requests of each interval; also t, timestamp, count, or rate (per second)
    TIMESTAMP,ContextTokens,GeneratedTokens
                            one request a row; also input_length, output_length, input_tokens, output_tokens
    {"timestamp": 0, "input_length": 512, "output_length": 20}
                            one request a line; the timestamp in milliseconds, or timestamp_us in microseconds

Times are numbers of seconds, or dates (UTC where they name no zone).
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

from moe_operator.errors import MoEOperatorError

_TIMES: Final = ("time", "t", "timestamp")
_JSON_TIMES: Final = (("timestamp", 1e-3), ("timestamp_us", 1e-6))
_COUNTS: Final = ("requests", "count", "rate")
_INPUTS: Final = ("contexttokens", "input_length", "input_tokens")
_OUTPUTS: Final = ("generatedtokens", "output_length", "output_tokens")
_MOST: Final = 1e18
_SHOWN: Final = 60
_KINDS: Final = (
    "a CSV file with the columns time,requests or t,rate (one row an interval), a CSV file with TIMESTAMP,"
    "ContextTokens,GeneratedTokens (one row a request), or a JSONL file with timestamp (ms) or timestamp_us"
)


class TraceError(MoEOperatorError):
    """A trace cannot be read. The message names the line and the expected content."""


@dataclass(frozen=True)
class Row:
    """An interval, or a request.

    count: requests, or requests per second; 1 for a single request. Tokens are None where unknown.
    """

    at: float
    """Seconds since the epoch, or since the origin of the file."""
    line: int
    count: float = 1.0
    input_tokens: float | None = None
    output_tokens: float | None = None


@dataclass(frozen=True)
class Recording:
    """A trace as it was recorded, in the order of the file."""

    path: Path
    rows: list[Row]
    intervals: bool
    """Whether a row is an interval, not a request."""
    per_second: bool = False
    """Whether the counts of intervals are rates."""


def shown(value: object) -> str:
    """A value of a trace as messages show it: its beginning, if it is long."""
    return repr(value)[:_SHOWN]


def read_recording(path: Path) -> Recording:
    """Reads a trace of any of the kinds above.

    Raises:
        TraceError: it is none of them, or damaged.
    """
    lines = _lines(path)
    head = next(lines, "").strip().lstrip("\ufeff")
    if head.startswith("{"):
        return Recording(path, list(_json_rows(path, head, lines)), intervals=False)
    columns = [column.strip().lower() for column in head.split(",")]
    time, count, prompt, answer = (_first(columns, names) for names in (_TIMES, _COUNTS, _INPUTS, _OUTPUTS))
    if time is None or (count is None and prompt is None and answer is None and time != "timestamp"):
        raise TraceError(f"{path}: its first line is {head[:_SHOWN]!r}; a trace is {_KINDS}")
    rows = _csv_rows(path, lines, columns, (time, count, prompt, answer))
    return Recording(path, list(rows), intervals=count is not None, per_second=count == "rate")


def _first(columns: Iterable[str], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _lines(path: Path) -> Iterator[str]:
    openers: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="") as text:
            yield from text
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a text file; a trace is {_KINDS}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"{path}: {reason}") from error


def _csv_rows(
    path: Path,
    lines: Iterable[str],
    columns: list[str],
    names: tuple[str, str | None, str | None, str | None],
) -> Iterator[Row]:
    places = [None if name is None else columns.index(name) for name in names]
    for number, row in enumerate(_csv_fields(path, lines), start=2):
        if not row:
            continue
        if len(row) != len(columns):
            raise TraceError(f"{path}:{number}: {len(row)} columns; the first line names {len(columns)}")
        at, count, prompt, answer = (None if place is None else row[place] for place in places)
        yield Row(
            _time(path, number, str(at)),
            number,
            1.0 if count is None else _amount(path, number, count),
            _known(path, number, prompt),
            _known(path, number, answer),
        )


def _csv_fields(path: Path, lines: Iterable[str]) -> Iterator[list[str]]:
    reader = csv.reader(lines)
    try:
        yield from reader
    except csv.Error as error:
        raise TraceError(f"{path}:{reader.line_num + 1}: not CSV: {error}") from error


def _json_rows(path: Path, head: str, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate([head, *lines], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise TraceError(f"{path}:{number}: a line is one request: an object with a timestamp")
        yield _json_row(path, number, record)


def _json_row(path: Path, number: int, record: dict[str, Any]) -> Row:
    at = next((_amount(path, number, record[key]) * unit for key, unit in _JSON_TIMES if key in record), None)
    if at is None:
        raise TraceError(f"{path}:{number}: timestamp (ms) or timestamp_us is missing")
    prompt, answer = (_first(record, names) for names in (_INPUTS, _OUTPUTS))
    return Row(
        at,
        number,
        input_tokens=_known(path, number, record[prompt] if prompt else None),
        output_tokens=_known(path, number, record[answer] if answer else None),
    )


def _time(path: Path, number: int, text: str) -> float:
    """Seconds since the epoch, of a number or a date and time (in UTC unless it names a zone)."""
    with contextlib.suppress(ValueError):
        return _finite(path, number, float(text))
    try:
        moment = datetime.fromisoformat(_microseconds(text.strip()))
    except ValueError as error:
        raise TraceError(
            f"{path}:{number}: {shown(text)} is not a time; write seconds, or like 2024-05-12 00:00:10"
        ) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _finite(path: Path, number: int, seconds: float) -> float:
    if not math.isfinite(seconds):
        raise TraceError(
            f"{path}:{number}: {seconds} is not a time; write seconds, or like 2024-05-12 00:00:10"
        )
    return seconds


def _microseconds(text: str) -> str:
    """Recorded times have seven decimals; Python reads six."""
    whole, point, digits = text.partition(".")
    return whole + point + digits[:6].ljust(6, "0") if point and digits.isdigit() else text


def _known(path: Path, number: int, value: object) -> float | None:
    return None if value is None else _amount(path, number, value)


def _amount(path: Path, number: int, value: object) -> float:
    try:
        amount = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        amount = math.nan
    if not 0 <= amount <= _MOST:  # as NaN is not, either
        raise TraceError(f"{path}:{number}: {shown(value)} is not a number of 0 or more, {_MOST:g} at most")
    return amount
