"""Chooses the next token of each sequence from its logits.

Legend: B sequences, S those of them that sample, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.sampling.parameters import SamplingParameters, uniform


@dataclass(frozen=True)
class Draw:
    """One choice to make: token number `index` of a request with `seed`."""

    parameters: SamplingParameters
    seed: int
    index: int


def choose(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token for each row of float32 logits."""
    tokens_B = logits_BV.argmax(dim=-1)
    sampled = [row for row, draw in enumerate(draws) if draw.parameters.temperature > 0]
    if sampled:
        tokens_B[sampled] = sample(logits_BV[sampled], [draws[row] for row in sampled])
    return [int(token) for token in tokens_B.tolist()]


def sample(logits_SV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens (int64 [S]) drawn by inverting the cumulative distribution of each row.

    Order as in transformers: temperature, then top-k, then top-p over what is left.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_SV.device).unsqueeze(1)

    vocabulary = logits_SV.shape[1]
    sorted_SV, order_SV = logits_SV.sort(dim=-1, descending=True, stable=True)
    # Subtracting the largest first keeps a tiny temperature from overflowing.
    heated_SV = (sorted_SV - sorted_SV[:, :1]) / column([draw.parameters.temperature for draw in draws])
    kept_S1 = column([float(draw.parameters.top_k or vocabulary) for draw in draws])
    ranks_V = torch.arange(vocabulary, device=logits_SV.device)
    chances_SV = heated_SV.masked_fill(ranks_V >= kept_S1, float("-inf")).softmax(dim=-1)
    before_SV = chances_SV.cumsum(dim=-1) - chances_SV
    dropped_SV = before_SV >= column([draw.parameters.top_p for draw in draws])
    dropped_SV[:, 0] = False
    cumulated_SV = chances_SV.masked_fill(dropped_SV, 0.0).cumsum(dim=-1)
    points_S1 = column([uniform(draw.seed, draw.index) for draw in draws]) * cumulated_SV[:, -1:]
    rank_S1 = torch.searchsorted(cumulated_SV, points_S1, right=True)
    # Rounding can put the point on the total itself; the last token with any chance is meant then.
    last_S1 = (chances_SV.masked_fill(dropped_SV, 0.0) > 0).sum(dim=-1, keepdim=True) - 1
    return order_SV.gather(1, torch.minimum(rank_S1, last_S1.clamp(min=0))).squeeze(1)
