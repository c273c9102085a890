"""Tokens that another process samples from its own logits, so that only the tokens travel.

A token depends on the logits, on a seed and an index, and on what truncates the distribution. So a process
that has these six numbers samples what the one that schedules would: it keeps no state of sequences. What
depends on the text so far (penalties, output formats), on long lists, or asks for log-probabilities is
sampled where that is known.
"""

from dataclasses import dataclass

from moe_worker.sampling.batch import Row
from moe_worker.sampling.parameters import SamplingParameters

# Instead of the token of a row that cannot be sampled.
FAILED = -1


@dataclass(frozen=True)
class Draw:
    """How the next token of a sequence is drawn; see SamplingParameters. index: tokens of the text so far."""

    seed: int
    index: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, row: Row) -> "Draw | None":
        """Of a sequence's next token; None where that takes more than these numbers."""
        given = row.parameters
        waits = row.generated < given.min_tokens and row.ends
        if given.penalizes or given.logit_bias or given.logprobs is not None or waits:
            return None
        return cls(row.seed, row.generated, given.temperature, given.top_k, given.top_p, given.min_p)

    @property
    def row(self) -> Row:
        """What the sampler takes."""
        parameters = SamplingParameters(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )
        return Row(parameters, self.seed, self.index, frozenset())
