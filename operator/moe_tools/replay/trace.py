"""A recorded trace as work that arrived in steps of equal length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import numpy as np

from moe_operator.autoscaling.model.forecast.past import Floats
from moe_tools.recorded import Recording, Row, TraceError, read_recording

_MINUTE_S: Final = 60.0
_LONGEST_S: Final = 3600.0
_MOST_STEPS: Final = 2_000_000


class Work(Enum):
    """What is counted."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True)
class WorkTrace:
    """Work that arrived, in steps of equal length."""

    name: str
    start: float
    """Start of the first step, seconds since the epoch."""
    step_s: float
    """Length of a step: the fewest whole recorded intervals that take a minute or longer."""
    rates: Floats
    """Work per minute [steps]; NaN where nothing was recorded."""


def read(path: Path, work: Work = Work.REQUESTS) -> WorkTrace:
    """Reads a trace of any kind that `recorded` knows.

    Raises:
        TraceError: it is none of them, or damaged, or too short.
    """
    recording = read_recording(path)
    if not recording.intervals:
        return _binned(recording, work)
    if work is Work.TOKENS:
        raise TraceError(f"{path}: it records no tokens, only requests; leave out --work tokens")
    return _spaced(recording)


def of_requests(name: str, times: Sequence[float], work: Sequence[float]) -> WorkTrace:
    """The work of single requests, counted by minute from the first one on.

    Args:
        name: of the trace.
        times: of the requests, in seconds, in any order; at least one.
        work: of each request.

    Raises:
        TraceError: the requests are years apart.
    """
    return _trace(Path(name), np.array(times, np.float64), np.array(work, np.float64), _MINUTE_S, 0)


def _spaced(recording: Recording) -> WorkTrace:
    """Rows of equal intervals; those left out are unknown, several in a minute are added up."""
    path, rows = recording.path, recording.rows
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
            f"{path}: intervals of {interval:.0f} s are too long; give {_LONGEST_S:.0f} s or less"
        )
    values = np.array([row.count for row in rows]) * (interval if recording.per_second else 1.0)
    # Whole intervals, so that every step has as many: minutes where they divide one.
    rows_per_step = max(1, math.ceil(_MINUTE_S / interval - 1e-6))
    return _trace(path, times, values, interval * rows_per_step, rows_per_step)


def _binned(recording: Recording, work: Work) -> WorkTrace:
    """Requests counted by minute from the first one on; a minute without any had none."""
    path, rows = recording.path, recording.rows
    if not rows:
        raise TraceError(f"{path}: no requests; give a trace with at least one")
    amounts = [1.0 if work is Work.REQUESTS else _tokens(path, row) for row in rows]
    return of_requests(str(path), [row.at for row in rows], amounts)


def _tokens(path: Path, row: Row) -> float:
    if row.input_tokens is None or row.output_tokens is None:
        raise TraceError(
            f"{path}:{row.line}: the trace has no prompt and output tokens; leave out --work tokens"
        )
    return row.input_tokens + row.output_tokens


def _trace(path: Path, times: Floats, work: Floats, step: float, rows_per_step: int) -> WorkTrace:
    """rows_per_step: rows that make a whole step, so that one with none of them is unknown; 0: any number."""
    start = math.floor(times.min() / step) * step if rows_per_step else float(times.min())
    index = ((times - start) / step).astype(np.int64)
    count = int(index.max()) + 1
    if count > _MOST_STEPS:
        raise TraceError(f"{path}: it spans {count * step / 86400:.0f} days; correct its times, or split it")
    sums = np.bincount(index, work, count)
    rates: Floats = np.asarray(sums * _MINUTE_S / step, np.float64)
    if rows_per_step:
        rows = np.bincount(index, minlength=count)
        with np.errstate(invalid="ignore", divide="ignore"):
            # A minute of which some seconds are missing was as busy as the rest of it.
            rates = np.where(rows > 0, rates * np.maximum(rows_per_step / rows, 1), np.nan)
    elif count > 1:
        rates = rates[:-1]  # the last minute was not recorded whole
    return WorkTrace(path.name, start, step, rates)
