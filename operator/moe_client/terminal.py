"""What commands print. Nothing that comes from a model, a cluster or a server acts on the terminal."""

from collections.abc import Callable
from typing import Any, TextIO

import click

from moe_api.visible import visible


def say(text: str, *, err: bool = False, file: Any = None) -> None:
    """Prints a line, with control characters made visible."""
    click.echo(visible(text), err=err, file=file)


def writer(stream: TextIO) -> Callable[[str], object]:
    """Writes text of a model: as it is into a pipe or a file, made visible on a terminal."""
    if not stream.isatty():
        return stream.write
    return lambda text: stream.write(visible(text))
