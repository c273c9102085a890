"""Progress on stderr: a bar that is redrawn on a terminal, plain lines at intervals in a log."""

import re
import sys
from collections.abc import Iterable
from typing import Any, Final, TextIO

from tqdm import tqdm

LINE_INTERVAL_S: Final = 30.0
"""In a log, the time between two lines of one bar; the first and the last are always written."""
TRANSIENT_AFTER_S: Final = 2.0
_LINE: Final = "{desc}: {percentage:.0f} % ({n_fmt} of {total_fmt}) after {elapsed}, {rate_fmt}{postfix}"
_CONTROL: Final = re.compile(r"\r|\x1b\[[0-9;]*[A-Z]")


class _Lines:
    """Converts tqdm's terminal output to lines: no carriage return, no cursor movement, no padding."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = _CONTROL.sub("", text).strip()
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()


def bar(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    unit_scale: bool = False,
    disable: bool = False,
) -> "tqdm[Any]":
    """A tqdm bar over `items`, or one of `total` units that its owner moves with `update`.

    Call `set_postfix` with refresh=False: each refresh is a line in a log.
    """
    return tqdm(
        items,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        unit_scale=unit_scale,
        disable=disable,
        **_style(),
    )


def transient_bar(*, desc: str, unit: str, total: int) -> "tqdm[Any]":
    """Of work that is often short and ends with a result: appears after TRANSIENT_AFTER_S, in a log after
    LINE_INTERVAL_S, and disappears at the end.
    """
    return tqdm(
        desc=desc, unit=unit, total=total, unit_scale=True, delay=TRANSIENT_AFTER_S, leave=False, **_style()
    )


def _style() -> dict[str, Any]:
    if sys.stderr.isatty():
        return {"file": sys.stderr}
    interval = {"mininterval": LINE_INTERVAL_S, "maxinterval": LINE_INTERVAL_S}
    return {"file": _Lines(sys.stderr), "bar_format": _LINE, **interval}


def tell(sentence: str) -> None:
    """Writes a message to stderr without breaking a bar that is shown there."""
    tqdm.write(sentence, file=sys.stderr)
