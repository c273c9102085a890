"""Bounds of a request by the lengths of its fields alone, shared by frontend and worker. Pure.

A check takes microseconds for any request, because it reads no element. Each function returns the problem, or
None.
"""

from collections.abc import Iterator
from typing import Final

from moe_api.inference.v1.inference_pb2 import OutputFormat, TaggedValues

MODEL_MOST: Final = 253
"""Characters of a served name that a request may ask for."""

FORMAT_MOST: Final = {"json_schema": 65_536, "regex": 4_096, "after": 64}
"""Characters of the fields of an output format."""

TAGS_MOST: Final = 128
TAGGED_MOST: Final = 65_536
"""Characters of all tags of tagged values."""
BETWEEN_MOST: Final = 256
"""Characters of each text before, between and behind tagged values."""


def characters_for(tokens: int, characters_per_token: int) -> int:
    """A text of more characters than this has more than `tokens` tokens."""
    return tokens * characters_per_token


def of_text(characters: int, tokens: int, characters_per_token: int) -> str | None:
    """Of a text that may have `tokens` tokens, each of up to `characters_per_token` characters."""
    most = characters_for(tokens, characters_per_token)
    if characters <= most:
        return None
    return f"has {characters} characters; {tokens} tokens are {most} characters at most"


def of_prompt_tokens(length: int, context_length: int) -> str | None:
    """Of a prompt in token ids; room for one token of continuation must be left."""
    if length < context_length:
        return None
    allowed = f"use {context_length - 1} at most, the context length of {context_length} less one"
    return f"has {length} tokens; {allowed}"


def of_list(length: int, most: int, elements: str) -> str | None:
    """Of a list of `elements`, e.g. "texts"."""
    return f"holds {length} {elements}; use {most} at most" if length > most else None


def of_name(characters: int, most: int = MODEL_MOST) -> str | None:
    """Of a name."""
    return f"has {characters} characters; use {most} at most" if characters > most else None


def of_output_format(output_format: OutputFormat) -> Iterator[tuple[str, str | None]]:
    """(field, problem) of each text of an output format."""
    for field, most in FORMAT_MOST.items():
        yield f"output_format.{field}", of_name(len(getattr(output_format, field)), most)
    if output_format.HasField("tagged"):
        yield from _of_tagged(output_format.tagged)


def _of_tagged(tagged: TaggedValues) -> Iterator[tuple[str, str | None]]:
    for field in ("before", "between", "behind"):
        yield f"output_format.tagged.{field}", of_name(len(getattr(tagged, field)), BETWEEN_MOST)
    if problem := of_list(len(tagged.tags), TAGS_MOST, "tags"):
        yield "output_format.tagged.tags", problem
        return
    total = sum(len(tag.begin) + len(tag.json_schema) + len(tag.end) for tag in tagged.tags)
    yield "output_format.tagged.tags", of_name(total, TAGGED_MOST)
