"""Errors of commands: one sentence, and an exit code for scripts."""

from typing import Any, Final

import click

from moe_api.visible import one_line
from moe_client.terminal import say

FAILED: Final = 1
WRONG: Final = 2
ABSENT: Final = 3
BUSY: Final = 4
LATE: Final = 5
_SENTENCE_MOST: Final = 4096
INTERRUPTED: Final = 130  # as in shells: 128 plus the number of SIGINT


class CommandError(click.ClickException):
    """A command failed.

    Args:
        sentence: what is wrong and what to do.
        exit_code: one of this module's.
    """

    exit_code: int  # type: ignore[misc]  # click documents it as a class variable, and sets it so itself

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code

    def show(self, file: Any = None) -> None:
        """Prints ``error: SENTENCE`` to stderr, in one line, even if a server wrote the text."""
        say(f"error: {one_line(self.format_message(), _SENTENCE_MOST)}", err=True, file=file)
