"""A recorded trace as requests to send, with their times and, if known, their lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moe_tools.recorded import Recording, TraceError, read_recording

_INTERVALS_MOST: Final = 10_000_000
"""Of a trace: a wrong time must not ask for more memory than there is."""


@dataclass(frozen=True)
class RequestTrace:
    """A recorded load: either `counts` of intervals, or single requests."""

    interval_s: float
    """Length of an interval in seconds; 0 where single requests are known."""
    counts: NDArray[np.float64]
    """Requests of each interval; empty where single requests are known."""
    at_s: NDArray[np.float64]
    """When each request came, in seconds since the first, ascending; empty where only counts are known."""
    input_tokens: NDArray[np.int64]
    """Tokens of each request's prompt; empty where unknown."""
    output_tokens: NDArray[np.int64]
    """Tokens of each request's continuation; empty where unknown."""


def read(path: Path) -> RequestTrace:
    """Reads a trace of any kind that `recorded` knows.

    Raises:
        TraceError: the file cannot be read or is no trace.
    """
    recording = read_recording(path)
    if not recording.rows:
        raise TraceError(f"{path}: no requests; give a trace with at least one")
    return _of_counts(recording) if recording.intervals else _of_requests(recording)


def _of_requests(recording: Recording) -> RequestTrace:
    times = np.array([row.at for row in recording.rows])
    earlier = np.diff(times) < 0
    if np.any(earlier):
        line = recording.rows[int(np.argmax(earlier)) + 1].line
        raise TraceError(
            f"{recording.path}:{line}: its time is before the line's above; sort the file by time"
        )
    prompts = _tokens([row.input_tokens for row in recording.rows])
    answers = _tokens([row.output_tokens for row in recording.rows])
    return RequestTrace(0.0, np.zeros(0), times - times[0], prompts, answers)


def _tokens(lengths: list[float | None]) -> NDArray[np.int64]:
    """Empty unless they are known for all requests."""
    known = [length for length in lengths if length is not None]
    return np.array(known if len(known) == len(lengths) else [], np.int64)


def _of_counts(recording: Recording) -> RequestTrace:
    path = recording.path
    times, counted = (
        np.array(values) for values in zip(*((r.at, r.count) for r in recording.rows), strict=True)
    )
    steps = np.diff(times)
    if not len(steps) or steps.min() <= 0:
        raise TraceError(f"{path}: it needs two rows or more, each later than the one above")
    interval = float(steps.min())
    if (times[-1] - times[0]) / interval >= _INTERVALS_MOST:
        raise TraceError(
            f"{path}: its times span more than {_INTERVALS_MOST:,} intervals of {interval:g} s; correct them"
        )
    places = np.round((times - times[0]) / interval).astype(np.int64)
    if len(np.unique(places)) < len(places):
        raise TraceError(
            f"{path}: rows are {steps.min():g} to {steps.max():g} s apart; write one an interval"
        )
    counts = np.zeros(int(places[-1]) + 1)  # an interval that the file omits has no requests
    counts[places] = counted * interval if recording.per_second else counted
    none = np.zeros(0, np.int64)
    return RequestTrace(interval, counts, np.zeros(0), none, none)
