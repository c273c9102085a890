"""N:4 patterns (arXiv 2104.08378): of four consecutive inputs, N have weights that are not zero.

Legend: O outputs, I inputs, Q = I / 4 quads of consecutive inputs; leading axes (experts) are allowed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

QUAD = 4


@dataclass(frozen=True)
class Pattern:
    """`kept` of four consecutive inputs keep their weight."""

    name: str
    kept: int


S14, S24 = Pattern("s14", 1), Pattern("s24", 2)
PATTERNS = {pattern.name: pattern for pattern in (S14, S24)}


def mask_keeping(scores: Tensor, kept: float) -> Tensor:
    """The weights to keep if quads keep `kept` on average, by their scores: bool of the same shape.

    Every quad keeps its floor(kept) best weights. If `kept` is fractional, the necessary number of quads
    keeps one more: those whose next weight scores highest. Of equal scores the first are kept. So masks
    tighten from 4 to N gradually, and a whole `kept` is exactly the pattern.

    Raises ValueError if I (scores is [..., I]) is not divisible by 4, or `kept` is not from 0 to 4.
    """
    if scores.shape[-1] % QUAD:
        raise ValueError(f"sparsity: input dimension {scores.shape[-1]} is not divisible by {QUAD}")
    if not 0 <= kept <= QUAD:
        raise ValueError(f"sparsity: kept is {kept}; it must be between 0 and {QUAD}")
    scores_Q4 = scores.detach().float().unflatten(-1, (-1, QUAD))
    order_Q4 = scores_Q4.argsort(dim=-1, descending=True, stable=True)
    rank_Q4 = order_Q4.argsort(dim=-1, stable=True)
    whole = int(kept)
    mask_Q4 = rank_Q4 < whole
    more = round((kept - whole) * scores_Q4[..., 0].numel())
    if more:
        next_Q = scores_Q4.gather(-1, order_Q4[..., whole : whole + 1]).flatten()
        chosen_Q = torch.zeros_like(next_Q, dtype=torch.bool)
        chosen_Q[next_Q.argsort(descending=True, stable=True)[:more]] = True
        mask_Q4 |= (rank_Q4 == whole) & chosen_Q.view(*rank_Q4.shape[:-1], 1)
    mask: Tensor = mask_Q4.flatten(-2)
    return mask
