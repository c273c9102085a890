"""Shows the progress and the summary of a replayed trace."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TextIO

import numpy as np
from rich import box, progress
from rich.console import Console
from rich.table import Table

from moe_client.console import console
from moe_client.console import show as show_table
from moe_tools.load.run import Arrivals, Outcome, Tally
from moe_tools.progress import LINE_INTERVAL_S

_PERCENTILES: Final = (50, 95, 99)


class Progress:
    """A progress bar on a terminal, otherwise a line every 30 s. A context manager."""

    def __init__(self, due: Arrivals, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock, self._total = out, clock, len(due.at_s)
        self._next_line_s = clock() + LINE_INTERVAL_S
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[state]}"),
            progress.TimeRemainingColumn(),
            console=Console(file=out),
            disable=not out.isatty(),
        )
        self._task = self._bar.add_task("sending", total=len(due.at_s), state="")

    def show(self, tally: Tally) -> None:
        """Shows the state of the run."""
        waiting = tally.sent - tally.ok - tally.failed
        state = f"{waiting} active, {tally.failed} failed"
        self._bar.update(self._task, completed=tally.sent, state=state)
        if self._bar.disable and self._clock() >= self._next_line_s:
            self._out.write(f"sent {tally.sent} of {self._total} requests; {state}\n")
            self._out.flush()
            self._next_line_s = self._clock() + LINE_INTERVAL_S

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def summarise(outcomes: Sequence[Outcome], due: Arrivals) -> dict[str, Any]:
    """The result of a run as JSON; times are seconds since a request was due."""
    good = [outcome for outcome in outcomes if outcome.code == "OK"]
    ends = [due.at_s[outcome.number] + outcome.total_s for outcome in outcomes]
    length = max(ends, default=0.0)
    codes = collections.Counter(outcome.code for outcome in outcomes)
    return {
        "requests": {
            "due": len(due.at_s),
            "sent": len(outcomes),
            "ok": len(good),
            "failed": {code: count for code, count in sorted(codes.items()) if code != "OK"},
        },
        "duration_s": length,
        "requests_per_s": len(outcomes) / length if length else 0.0,
        "tokens_per_s": sum(outcome.tokens for outcome in outcomes) / length if length else 0.0,
        "time_to_first_token_s": _percentiles(o.first_s for o in good if o.first_s is not None),
        "time_per_output_token_s": _percentiles(
            (o.total_s - o.first_s) / (o.tokens - 1) for o in good if o.first_s is not None and o.tokens > 1
        ),
        "request_s": _percentiles(outcome.total_s for outcome in good),
        "sent_late_s": _percentiles(outcome.sent_s for outcome in outcomes),
    }


def _percentiles(values: Iterable[float]) -> dict[str, float] | None:
    known = list(values)
    if not known:
        return None
    return {f"p{p}": float(np.percentile(known, p)) for p in _PERCENTILES} | {"max": max(known)}


def show(summary: Mapping[str, Any], on: Console | None = None) -> None:
    """Prints a summary as a table."""
    on = on or console()
    requests = summary["requests"]
    failed = ", ".join(f"{count} {code}" for code, count in requests["failed"].items()) or "none failed"
    on.print(
        f"{requests['sent']} of {requests['due']} requests in {summary['duration_s']:.1f} s: "
        f"{requests['ok']} ok, {failed}; {summary['requests_per_s']:.4g} requests/s, "
        f"{summary['tokens_per_s']:.4g} tokens/s",
        highlight=False,
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("Milliseconds since a request was due")
    for heading in (*(f"p{p}" for p in _PERCENTILES), "max"):
        table.add_column(heading, justify="right")
    rows = {
        "first token": "time_to_first_token_s",
        "each later token": "time_per_output_token_s",
        "whole answer": "request_s",
        "sent (our own delay)": "sent_late_s",
    }
    for heading, key in rows.items():
        if summary[key] is not None:
            table.add_row(heading, *(f"{1e3 * value:.1f}" for value in summary[key].values()))
    show_table(table, on)
