"""Draws tokens from distributions, alike on every device and in every batch.

Likelihoods are turned into integers (40 bits after the point) before they are added up. Sums of integers do
not depend on their order, so neither the size of the batch nor the way a device splits a sum changes a token;
sums of floats do, and torch adds up one row by another kernel than many. A likelihood below 2^-40 of the
largest is taken as none.

Truncation is one threshold a row: with likelihoods relative to the largest, top-k, top-p and min-p each keep
all tokens at or above some value, so the largest of the three values does for all, and nothing is sorted.

Legend: S rows that sample, V vocabulary, K the largest top-k among rows, D digits (1024).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.sampling.randomness import GOLDEN, LAST_SHIFT, ROUNDS, signed

POINT_BITS = 40
# Up to this many, the k-th largest value comes from a partial sort; above, from counting by digits.
SHORT_TOP_K = 1024
DIGIT_BITS = 10
# Bit patterns of floats in [0, 1] are below 2^30, and in the order of their values.
DIGIT_SHIFTS = (20, 10, 0)
# Float32 has no reciprocal for smaller temperatures, and devices may take them as 0.
MIN_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class Truncation:
    """What of the distributions is kept; None where no row wants it.

    top_k_S1: int64, 0 for all. largest_top_k: of all rows. top_p_S1: float64, 1 for all. min_p_S1: float32.
    short: every row that has a top_p below 1 has a top_k, too, of SHORT_TOP_K at most.
    """

    top_k_S1: Tensor | None = None
    largest_top_k: int = 0
    top_p_S1: Tensor | None = None
    short: bool = False
    min_p_S1: Tensor | None = None


def uniforms(states_S: Tensor, indices_S: Tensor) -> Tensor:
    """randomness.uniform of each pair: float64 in [0, 1), of the shape that both broadcast to.

    states_S: randomness.mix of the seeds, as int64. indices_S: int64.
    """
    bits_S = states_S + (indices_S + 1) * signed(GOLDEN)
    for shift, factor in ROUNDS:
        bits_S = (bits_S ^ _shifted(bits_S, shift)) * signed(factor)
    return _shifted(bits_S ^ _shifted(bits_S, LAST_SHIFT), 11).double() * 2.0**-53


def draw(
    scores_SV: Tensor, peaks_S1: Tensor, temperatures_S1: Tensor, keep: Truncation, uniforms_S: Tensor
) -> Tensor:
    """One token a row (int64 [S]), by inverting the cumulative distribution at `uniforms_S`.

    scores_SV: float32 logits. peaks_S1: the largest of each row; a row where it is not finite gives any token
    in the vocabulary. temperatures_S1: float32, MIN_TEMPERATURE or more.
    """
    weights_SV = ((scores_SV - peaks_S1) / temperatures_S1).exp_()
    masses_SV = _masses(weights_SV)
    threshold_S1 = _threshold(weights_SV, masses_SV, keep)
    if threshold_S1 is not None:
        masses_SV = masses_SV.masked_fill_(weights_SV < threshold_S1, 0)
    cumulated_SV = masses_SV.cumsum(dim=-1)
    totals_S = cumulated_SV[:, -1]
    points_S = torch.minimum((uniforms_S * totals_S).long(), totals_S - 1)
    tokens_S = torch.searchsorted(cumulated_SV, points_S.unsqueeze(1), right=True).squeeze(1)
    return tokens_S.clamp_(max=scores_SV.shape[1] - 1)


def _masses(weights: Tensor) -> Tensor:
    """Likelihoods in [0, 1] as integers."""
    return (weights * 2.0**POINT_BITS).long()


def _threshold(weights_SV: Tensor, masses_SV: Tensor, keep: Truncation) -> Tensor | None:
    """The likelihood (float32 [S, 1]) that a token must have to be kept; None: keep all."""
    kth_S1 = largest_SK = None
    if keep.top_k_S1 is not None:
        kth_S1, largest_SK = _kth(weights_SV, keep.top_k_S1, keep.largest_top_k)
    parts = [kth_S1, keep.min_p_S1]
    if keep.top_p_S1 is not None:
        parts.append(_nucleus(weights_SV, masses_SV, keep, kth_S1, largest_SK))
    given = [part for part in parts if part is not None]
    return torch.stack(given).amax(dim=0) if given else None


def _kth(weights_SV: Tensor, top_k_S1: Tensor, largest: int) -> tuple[Tensor, Tensor | None]:
    """The k-th largest weight of each row (0 where k is 0), and the K largest, falling, if K is small."""
    if largest <= SHORT_TOP_K:
        largest_SK = weights_SV.topk(min(largest, weights_SV.shape[1]), dim=-1).values
        kth_S1 = largest_SK.gather(1, (top_k_S1 - 1).clamp(min=0))
    else:
        largest_SK = None
        kth_S1 = mass_threshold(weights_SV, torch.ones_like(weights_SV, dtype=torch.int64), top_k_S1)
    return kth_S1.masked_fill(top_k_S1 == 0, 0.0), largest_SK


def _nucleus(
    weights_SV: Tensor, masses_SV: Tensor, keep: Truncation, kth_S1: Tensor | None, largest_SK: Tensor | None
) -> Tensor:
    """The least likelihood in the smallest set that holds top_p of what top-k left."""
    if kth_S1 is not None:
        masses_SV = masses_SV.masked_fill(weights_SV < kth_S1, 0)
    totals_S1 = masses_SV.sum(dim=-1, keepdim=True)
    # `short` is only said where all rows concerned have a top_k, so both are there.
    top_p_S1 = torch.ones_like(totals_S1, dtype=torch.float64) if keep.top_p_S1 is None else keep.top_p_S1
    targets_S1 = (totals_S1 * top_p_S1).ceil().long().clamp(min=1)
    if not keep.short or largest_SK is None or kth_S1 is None:
        return mass_threshold(weights_SV, masses_SV, targets_S1)
    before_S1 = (_masses(largest_SK).cumsum(dim=-1) < targets_S1).sum(dim=-1, keepdim=True)
    # Beyond the K largest there are only tokens as likely as the last of them, or rows without top_p.
    found_S1 = largest_SK.gather(1, before_S1.clamp(max=largest_SK.shape[1] - 1))
    return found_S1.masked_fill(top_p_S1 == 1, 0.0)


def mass_threshold(weights_SV: Tensor, masses_SV: Tensor, targets_S1: Tensor) -> Tensor:
    """The largest weight (float32 [S, 1]) such that all tokens of at least that weight hold `targets_S1`.

    Looks at the bit patterns of the weights 10 bits at a time, as radix sort does: three passes, with sums of
    masses_SV (int64, not negative) in 1024 bins. weights_SV: float32 in [0, 1]. A row that does not hold its
    target gives 0.
    """
    bits_SV = weights_SV.contiguous().view(torch.int32)
    prefix_S1 = torch.zeros_like(targets_S1)
    for shift in DIGIT_SHIFTS:
        inside_SV = (bits_SV >> (shift + DIGIT_BITS)) == prefix_S1
        digits_SV = ((bits_SV >> shift) & (2**DIGIT_BITS - 1)).long()
        bins_SD = masses_SV.new_zeros(bits_SV.shape[0], 2**DIGIT_BITS)
        bins_SD.scatter_add_(1, digits_SV, masses_SV * inside_SV)
        above_SD = bins_SD.flip(1).cumsum(dim=1).flip(1)
        digit_S1 = ((above_SD >= targets_S1).sum(dim=1, keepdim=True) - 1).clamp(min=0)
        targets_S1 = targets_S1 - (above_SD - bins_SD).gather(1, digit_S1)
        prefix_S1 = (prefix_S1 << DIGIT_BITS) | digit_S1
    return prefix_S1.int().view(torch.float32)


def _shifted(bits_S: Tensor, count: int) -> Tensor:
    """Shifted right with zeros: int64 shifts in its sign."""
    return (bits_S >> count) & ((1 << (64 - count)) - 1)
