"""Formats that a text must have. No torch: the RPC edge checks with this."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moe_worker.sampling.parameters import SamplingParameters, Violation

Kind = Literal["json_object", "json_schema", "regex"]


@dataclass(frozen=True)
class OutputFormat:
    """What a text must be.

    Attributes:
        kind: a JSON object of any content, JSON that satisfies a schema, or a match of a regular expression.
        text: the schema or the expression.
        after: the format begins after the first occurrence of this text; "": with the first token.
    """

    kind: Kind
    text: str = ""
    after: str = ""

    def violations(self, sampling: SamplingParameters, ends: frozenset[int]) -> Iterator[Violation]:
        """What can be said without compiling the format. `ends`: the model's end-of-text tokens."""
        if sampling.ignore_eos or sampling.min_tokens:
            yield Violation("output_format", "excludes ignore_eos and min_tokens: its text ends by itself")
        if not ends:
            yield Violation("output_format", "needs a model with an end-of-text token; leave it out")
