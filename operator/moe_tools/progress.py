"""Progress of long commands on stderr: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_INTERVAL_S: Final = 30.0
"""In a log, the time between two lines about the same work; the first and the last are always written."""


class Advance(Protocol):
    """Reports progress."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """`done` of `total`; None keeps the previous total."""


class Lines:
    """An `Advance` that writes a line at the start, one every 30 s, and one at the end of the work."""

    def __init__(
        self, what: str, total: int | None, out: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._out, self._clock = what, total, out, clock
        self._started_s = clock()
        self._write(0)

    def __call__(self, done: int, total: int | None = None) -> None:
        """Writes a line if one is due."""
        self._total = self._total if total is None else total
        ended = done == self._total and done != self._written
        if ended or self._clock() - self._written_s >= LINE_INTERVAL_S:
            self._write(done)

    def _write(self, done: int) -> None:
        self._written, self._written_s = done, self._clock()
        minutes, seconds = divmod(int(self._written_s - self._started_s), 60)
        known = f"{100 * done // self._total} % ({done} of {self._total})" if self._total else f"{done} done"
        self._out.write(f"{self._what}: {known} after {minutes}:{seconds:02d}\n")
        self._out.flush()


def behind(advance: Advance, before: int, total: int | None = None) -> Callable[[int], None]:
    """Tells `advance` the steps of a part of the work, if `before` steps were done ahead of it."""
    return lambda done: advance(before + done, total)


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Advance]:
    """A bar that disappears at the end; lines if stderr is not a terminal.

    total: of the work; None if the first step sets it.
    """
    if not sys.stderr.isatty():
        yield Lines(what, total, sys.stderr)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)

        def advance(done: int, total: int | None = None) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
