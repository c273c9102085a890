"""Recorded traces of real services: when requests came, and where it is known how long they were.

CSV, or JSON lines, plain or compressed (.gz, .xz). Columns are found by their names, in any case:

    time,requests           requests of each interval; also t, timestamp and rate (requests per second)
    timestamp,ContextTokens,GeneratedTokens
                            one request a row; also input_length, output_length, input_tokens, output_tokens
    {"timestamp": 0, "input_length": 512, "output_length": 20}
                            one request a line; the timestamp in milliseconds, or timestamp_us in microseconds

Times are numbers of seconds or dates. (`moe replay` reads the same kinds into rates of minutes; here single
requests count, and how long they were.)
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moe_operator.errors import MoEOperatorError

_TIMES: Final = {"time": 1.0, "t": 1.0, "timestamp": 1.0, "timestamp_us": 1e-6, "timestamp_ms": 1e-3}
"""Names of the column with the time, and its unit in seconds."""
_COUNTS: Final = ("requests", "count", "rate")
_INPUTS: Final = ("contexttokens", "input_length", "input_tokens")
_OUTPUTS: Final = ("generatedtokens", "output_length", "output_tokens")
_UNPACKERS: Final = {".gz": gzip.decompress, ".xz": lzma.decompress}


class TraceError(MoEOperatorError):
    """A file is not a trace; the sentence says where and why."""


@dataclass(frozen=True)
class Trace:
    """A recorded load. Either `counts` or single requests are known."""

    name: str
    start: float
    """Time of the first row, seconds since the epoch, or whatever the file counts from."""
    interval_s: float
    """Length of an interval in seconds; 0 where single requests are known."""
    counts: NDArray[np.float64]
    """Requests of each interval; empty where single requests are known."""
    at_s: NDArray[np.float64]
    """When each request came, in seconds since `start`, ascending; empty where only counts are known."""
    input_tokens: NDArray[np.int64]
    """Tokens of each request's prompt; empty where unknown."""
    output_tokens: NDArray[np.int64]
    """Tokens of each request's continuation; empty where unknown."""

    @property
    def duration_s(self) -> float:
        """Length of the trace in seconds."""
        if len(self.counts):
            return len(self.counts) * self.interval_s
        return float(self.at_s[-1]) if len(self.at_s) else 0.0

    def per_interval(self, interval_s: float) -> NDArray[np.float64]:
        """Requests of each whole interval of another length; a multiple of the trace's own, if it has one.

        Raises:
            TraceError: it is not.
        """
        if not len(self.counts):
            whole = math.floor(self.duration_s / interval_s)
            bins = np.floor(self.at_s / interval_s).astype(np.int64)
            return np.bincount(bins[bins < whole], minlength=whole).astype(np.float64)
        factor = round(interval_s / self.interval_s)
        if factor < 1 or not math.isclose(factor * self.interval_s, interval_s):
            raise TraceError(
                f"{self.name} counts requests in intervals of {self.interval_s:g} s; they cannot become "
                f"intervals of {interval_s:g} s"
            )
        whole = len(self.counts) // factor * factor
        return np.asarray(self.counts[:whole].reshape(-1, factor).sum(axis=1))


def read(path: Path) -> Trace:
    """Reads a trace.

    Raises:
        TraceError: the file cannot be read or is no trace.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in _UNPACKERS]
    name = path.name.removesuffix(path.suffix if path.suffix in _UNPACKERS else "")
    try:
        packed = path.read_bytes()
        raw = _UNPACKERS[path.suffix](packed) if path.suffix in _UNPACKERS else packed
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    parse = _json_lines if suffixes[-1:] in ([".jsonl"], [".ndjson"]) else _csv_rows
    rows = list(parse(text, name))
    if not rows:
        raise TraceError(f"{name} holds no rows")
    return _trace(rows, name, unit=1e-3 if parse is _json_lines else 1.0)


def _json_lines(text: str, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{name}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise TraceError(f"{name}, line {number} is no JSON object")
        yield {str(key).lower(): value for key, value in row.items()}


def _csv_rows(text: str, name: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            yield {str(key).strip().lower(): value for key, value in row.items()}
    except csv.Error as error:
        raise TraceError(f"{name}, line {reader.line_num} is no CSV: {error}") from error


def _trace(rows: list[dict[str, Any]], name: str, unit: float) -> Trace:
    columns = rows[0]
    when = next((column for column in _TIMES if column in columns), None)
    if when is None:
        raise TraceError(f"{name} has no column {', '.join(_TIMES)}, but {', '.join(map(str, columns))}")
    scale = unit if when == "timestamp" else _TIMES[when]
    times = _column(rows, when, name, lambda value: _seconds(value, scale))
    if np.any(np.diff(times) < 0):
        times_at = int(np.argmax(np.diff(times) < 0)) + 2
        raise TraceError(f"{name}, row {times_at}: its time is before the row's above; sort the file by time")
    count = next((column for column in _COUNTS if column in columns), None)
    if count is not None:
        return _of_counts(rows, times, count, name)
    lengths = [_lengths(rows, names, name) for names in (_INPUTS, _OUTPUTS)]
    start, none = float(times[0]), np.zeros(0)
    return Trace(name, start, 0.0, none, times - start, *lengths)


def _of_counts(rows: list[dict[str, Any]], times: NDArray[np.float64], count: str, name: str) -> Trace:
    steps = np.diff(times)
    if not len(steps) or steps.min() <= 0:
        raise TraceError(f"{name} needs two rows or more, each later than the one above")
    interval = float(steps.min())
    numbers = _column(rows, count, name, float)
    if not np.all(np.isfinite(numbers)) or numbers.min() < 0:
        raise TraceError(f"{name}, column {count}: a number of requests is 0 or more")
    places = np.round((times - times[0]) / interval).astype(np.int64)
    if len(np.unique(places)) < len(places):
        raise TraceError(
            f"{name}: rows are {steps.min():g} to {steps.max():g} s apart; write one an interval"
        )
    counts = np.zeros(int(places[-1]) + 1)  # what is left out of a file of counts is an interval without any
    counts[places] = numbers * interval if count == "rate" else numbers
    none = np.zeros(0, np.int64)
    return Trace(name, float(times[0]), interval, counts, np.zeros(0), none, none)


def _lengths(rows: list[dict[str, Any]], names: Iterable[str], name: str) -> NDArray[np.int64]:
    column = next((column for column in names if column in rows[0]), None)
    if column is None:
        return np.zeros(0, np.int64)
    lengths = _column(rows, column, name, float)
    if not np.all(np.isfinite(lengths)) or lengths.min() < 0:
        raise TraceError(f"{name}, column {column}: a number of tokens is 0 or more")
    return lengths.astype(np.int64)


def _column(
    rows: list[dict[str, Any]], column: str, name: str, parse: Callable[[Any], float]
) -> NDArray[np.float64]:
    values = np.zeros(len(rows))
    for number, row in enumerate(rows):
        try:
            values[number] = parse(row[column])
        except (KeyError, TypeError, ValueError) as error:
            found = row.get(column)
            raise TraceError(f"{name}, row {number + 1}: {column} is {found!r}, which is no value") from error
    return values


def _seconds(value: Any, scale: float) -> float:
    try:
        return float(value) * scale
    except ValueError:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
