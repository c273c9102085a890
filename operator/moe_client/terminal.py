"""Prints output of commands. Text of a model, a cluster or a server cannot control the terminal."""

from collections.abc import Callable
from typing import Any, TextIO

import click

from moe_api.visible import visible


def say(text: str, *, err: bool = False, file: Any = None) -> None:
    """Prints a line with visible control characters."""
    click.echo(visible(text), err=err, file=file)


def writer(stream: TextIO) -> Callable[[str], object]:
    """Writes text of a model: unchanged into a pipe or file, with visible control characters otherwise."""
    if not stream.isatty():
        return stream.write
    return lambda text: stream.write(visible(text))
