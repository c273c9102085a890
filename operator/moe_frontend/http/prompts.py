"""The prompts of a completion request. Pure."""

from collections.abc import Sequence
from typing import Any, Final, cast

from moe_frontend.http.errors import invalid
from moe_frontend.http.schemas import CHOICES_MOST

Prompt = str | list[int]
TOGETHER_MOST: Final = 64 * 2**20
"""Characters or token ids of all prompts of one request: each text is a request with a copy of its prompt."""


def prompts(given: Any) -> list[Prompt]:
    """One or more prompts: a text, token ids, or a list of either.

    Args:
        given: as `schemas.CompletionRequest.prompt` declares it.

    Raises:
        ApiError: there is none, or the list mixes kinds.
    """
    if given is None:
        raise invalid("prompt", "is missing; give a text, a list of texts or token ids")
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("prompt", "is an empty list; give at least one prompt")
    kinds = {type(part) for part in given}
    if len(kinds) > 1:
        raise invalid("prompt", "mixes texts, token ids and lists; give a list of one kind")
    if kinds == {int}:
        return [cast("list[int]", given)]
    return list(given)


def check_number(prompts: Sequence[Prompt], n: int) -> None:
    """Refuses more texts, or longer prompts of them, than one request may ask for.

    Raises:
        ApiError: there are too many.
    """
    if len(prompts) * n > CHOICES_MOST:
        problem = f"asks for {len(prompts) * n} texts ({len(prompts)} prompts, n = {n})"
        remedy = f"ask for {CHOICES_MOST} at most in one request"
        raise invalid("prompt" if n == 1 else "n", f"{problem}; {remedy}")
    check_together(sum(map(len, prompts)), n)


def check_together(length: int, n: int) -> None:
    """Refuses prompts whose copies for `n` texts take too much memory.

    length: of all prompts, in characters or token ids.

    Raises:
        ApiError: they do.
    """
    if length * n > TOGETHER_MOST:
        problem = f"asks for {n} texts of {length} characters each; {TOGETHER_MOST} together are the most"
        raise invalid("n", f"{problem}, so send several requests")
