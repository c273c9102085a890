"""Progress of the build, for a terminal or a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

LINE_INTERVAL_S = 15.0
"""In a log, the time between two lines about the same activity."""


@dataclass(frozen=True)
class Step:
    """What is being done, how much of it (`done` of `total`, where known), and seconds since the start."""

    activity: str
    done: int | None = None
    total: int | None = None
    elapsed_s: float = 0.0

    def __str__(self) -> str:
        minutes, seconds = divmod(int(self.elapsed_s), 60)
        done = "" if self.done is None else f" {self.done}"
        total = "" if self.total is None else f"/{self.total}"
        elapsed = f"  {minutes}:{seconds:02d}" if self.elapsed_s else ""
        return f"{self.activity}{done}{total}{elapsed}"


Progress = Callable[[Step], None]


def ignore(_step: Step) -> None:
    """Shows nothing."""


class Reporter:
    """Shows steps on a stream: one line rewritten in place on a terminal, else a line now and then."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._rewrites = stream.isatty()
        self._activity = ""
        self._last_s = 0.0
        self._open_line = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()

    def show(self, step: Step) -> None:
        """Shows this step, unless in a log one of the same activity was shown a moment ago."""
        now_s = self._clock()
        if self._rewrites:
            self._stream.write(f"\r\x1b[K{step}")
            self._open_line = True
        elif self._is_news(step, now_s):
            self._stream.write(f"{step}\n")
            self._last_s = now_s
        self._activity = step.activity
        self._stream.flush()

    def _is_news(self, step: Step, now_s: float) -> bool:
        finished = step.total is not None and step.done == step.total
        return step.activity != self._activity or finished or now_s - self._last_s >= LINE_INTERVAL_S
