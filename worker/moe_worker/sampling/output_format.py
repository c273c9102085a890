"""Formats that a text must have. No torch: the RPC edge checks with this."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moe_worker.sampling.parameters import SamplingParameters, Violation

Kind = Literal["json_object", "json_schema", "regex", "tagged"]


@dataclass(frozen=True)
class Tag:
    """`begin`, JSON that satisfies `schema`, and `end`."""

    begin: str
    schema: str
    end: str


@dataclass(frozen=True)
class TaggedValues:
    """`before`, values by any of `tags` with `between` between them, and `behind`. single: one value only."""

    tags: tuple[Tag, ...]
    before: str = ""
    between: str = ""
    behind: str = ""
    single: bool = False


@dataclass(frozen=True)
class OutputFormat:
    """What a text must be.

    Attributes:
        kind: a JSON object of any content, JSON that satisfies a schema, a match of a regular expression, or
            values between fixed texts.
        text: the schema or the expression.
        after: the format begins after the first occurrence of this text; "": with the first token.
        tagged: the values of kind "tagged".
    """

    kind: Kind
    text: str = ""
    after: str = ""
    tagged: TaggedValues | None = None

    def violations(self, sampling: SamplingParameters, ends: frozenset[int]) -> Iterator[Violation]:
        """What can be said without compiling the format. `ends`: the model's end-of-text tokens."""
        if sampling.ignore_eos or sampling.min_tokens:
            yield Violation("output_format", "excludes ignore_eos and min_tokens: its text ends by itself")
        if not ends:
            yield Violation("output_format", "needs a model with an end-of-text token; leave it out")
