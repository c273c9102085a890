"""The prompts that a step scores: which rows of its logits, and whose tokens they predict.

Legend: N rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.engine.active import ActiveRequest
from moe_worker.kernels.transfer import to_device
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.prompt_scores import score
from moe_worker.sampling.sampler import Logprobs
from moe_worker.scheduler.plan import Chunk


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `end` - 1 of a prompt, which a step scores.

    row: of the forward pass, whose logits predict the first of them; those of the others follow it.
    """

    active: ActiveRequest
    first: int
    end: int
    row: int

    @property
    def rows(self) -> range:
        """Rows of the forward pass."""
        return range(self.row, self.row + self.end - self.first)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that are scored."""
        return self.active.request.prompt[self.first : self.end]

    def take(self, scores: Sequence[TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
        """The scores that are new: after a preemption tokens are computed, and scored, again."""
        new = scores[max(0, self.active.scored - self.first) :]
        self.active.scored = max(self.active.scored, self.end)
        return tuple(new)


def spans(chunks: Sequence[Chunk], active: Sequence[ActiveRequest]) -> list[Span]:
    """What the step of these chunks scores, in their order."""
    found, row = list[Span](), 0
    if True not in [each.scores for each in active]:
        return found
    for chunk, each in zip(chunks, active, strict=True):
        first = max(chunk.start + 1, each.scored)
        end = min(chunk.length + 1, len(each.request.prompt))
        if each.scores and first < end:
            found.append(Span(each, first, end, row + first - 1 - chunk.start))
        row += len(chunk.tokens)
    return found


def score_spans(logits_NV: Tensor, rows: Sequence[int], wanted: Sequence[Span]) -> Logprobs:
    """The scores of all spans, one after the other. rows: of the forward pass, of each row of `logits_NV`."""
    places = {row: place for place, row in enumerate(rows)}
    chosen = [places[row] for span in wanted for row in span.rows]
    tokens = [token for span in wanted for token in span.tokens]
    likely = [span.active.request.sampling.prompt_logprobs or 0 for span in wanted for _ in span.rows]
    chosen_L = to_device(torch.tensor(chosen, dtype=torch.int64), logits_NV.device)
    return score(logits_NV.index_select(0, chosen_L), tokens, likely)
