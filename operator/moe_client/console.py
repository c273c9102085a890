"""Fits tables to a terminal, a pipe or a file."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.text import Text

_UNLIMITED: Final = 100_000
"""Width if there is no limit."""
_NARROWEST: Final = 20
"""Minimum width of prose."""


class Prose(Text):
    """A sentence, which a narrow table folds; names and times are not folded."""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """The longest word asks for no more than any other text."""
        width = super().__rich_measure__(console, options)
        return Measurement(min(width.minimum, _NARROWEST), width.maximum)


def console(**options: Any) -> Console:
    """Standard output, as wide as the terminal or COLUMNS; otherwise so wide that no line is folded."""
    free = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return Console(width=_UNLIMITED if free else None, **options)


def show(renderable: RenderableType, on: Console) -> None:
    """Prints, at least so wide that every name is whole: a terminal that is narrower wraps the lines itself.

    In a pipe the spaces that fill the last column of a table are left out.
    """
    least = Measurement.get(on, on.options.update(max_width=_UNLIMITED), renderable).minimum
    on.width = max(on.width, least)
    if on.is_terminal:
        on.print(renderable)
        return
    with on.capture() as capture:
        on.print(renderable)
    on.file.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())
