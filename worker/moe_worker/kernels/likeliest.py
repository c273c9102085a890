"""The likeliest token of each row of scores.

Legend: B rows, V vocabulary.
"""

import math
from typing import NamedTuple

from torch import Tensor


class Likeliest(NamedTuple):
    """The first of each row's likeliest tokens, int64, its score, float32, and whether the row fails, bool.

    A row fails where a score is NaN or +inf or all are -inf; its token is 0, and its score is not finite.
    """

    tokens_B: Tensor
    peaks_B: Tensor
    failed_B: Tensor


def likeliest(scores_BV: Tensor) -> Likeliest:
    """Of each row of float32 scores."""
    if scores_BV.is_cuda:
        # Triton exists where torch has CUDA, and takes seconds to import.
        from moe_worker.kernels.triton.greedy import best_tokens  # noqa: PLC0415

        return Likeliest(*best_tokens(scores_BV))
    # The largest score is NaN or infinite in just the rows that fail.
    peaks_B, tokens_B = scores_BV.max(dim=-1)
    failed_B = (peaks_B.abs() < math.inf).logical_not_()
    return Likeliest(tokens_B.masked_fill_(failed_B, 0), peaks_B, failed_B)
