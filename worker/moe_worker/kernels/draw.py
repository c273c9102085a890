"""Draws tokens from distributions with noise that belongs to the tokens, not to the batch.

The drawn token has the smallest E / w, where w is its likelihood and E its own exponential number: the
Gumbel-max trick (Gumbel 1954; Maddison, Tarlow and Minka, arXiv:1411.0030) without logarithms. If logits
differ by d, as they do between batches, another token is drawn only if the two best differ by less than about
d: one draw in 100,000 for d = 5e-6. Inverting the cumulative distribution would amplify d: the sum of all
likelihoods before a token changes.

A number for each token of the vocabulary would cost more than all the rest, so there are two stages: first a
block of 256 tokens is drawn by the sums of likelihoods, then a token in the block. The distribution is the
same, since P(token) = P(block) P(token | block), with V / 256 + 256 numbers a row.

Likelihoods are rounded to integers (40 fractional bits) before they are summed. Such sums are exact in
float64 and int64, so neither the batch size nor the way a device splits a sum changes a token. A likelihood
below 2^-40 of the largest counts as 0.

Truncation is one threshold a row: with likelihoods relative to the largest, top-k, top-p and min-p each keep
all tokens at or above a value, so the largest of the three values is the threshold and nothing is sorted.

Legend: B rows of the batch, S rows that sample, V vocabulary, N blocks, C = N * 256 places of tokens, K the
largest top-k among rows, L lanes of noise, D digits (1024).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.kernels.likeliest import Likeliest
from moe_worker.kernels.randomness import GOLDEN, LAST_SHIFT, ROUNDS, UNIFORM_BITS, signed

# Masses are likelihoods, of which the largest is 1, in steps of 1 / UNIT.
UNIT = 2.0**40
# Tokens of a block. With 100,000 tokens there are about as many blocks as places in one.
BLOCK = 256
# Up to this many, the k-th largest value comes from a partial sort; above, from counting by digits.
SHORT_TOP_K = 1024
DIGIT_BITS = 10
# Bit patterns of floats in [0, 1] are below 2^30, and in the order of their values.
DIGIT_SHIFTS = (20, 10, 0)
# The mass of its exponential is 0. On a CPU, torch takes 30 times as long for the exponential of -inf, which
# refused tokens have.
SURELY_ZERO = -64.0
# Noise of so many steps, or so many numbers of it, is computed together.
BLOCK_STEPS = 32
BLOCK_NUMBERS = 2**15
# Float32 has no reciprocal for smaller temperatures, and devices may take them as 0.
MIN_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class Truncation:
    """Truncation of the distributions; a field is None if no row needs it.

    top_k_S1: int64, 0 for all. largest_top_k: of all rows. top_p_S1: float64, 1 for all.
    short: every row with a top_p below 1 has a top_k of at most SHORT_TOP_K, too.
    min_mass_S1: float32, the least mass that min-p keeps.
    limits_S3: float64, all three of each row, if any has top-k or top-p.
    """

    top_k_S1: Tensor | None = None
    largest_top_k: int = 0
    top_p_S1: Tensor | None = None
    short: bool = False
    min_mass_S1: Tensor | None = None
    limits_S3: Tensor | None = None


@dataclass
class Sampling:
    """Some of the rows that sample: int64 rows_S, float32 temperatures_S1.

    states_S1, indices_S1: int64, the state of each seed, and the index of the row's next token at step 0.
    """

    rows_S: Tensor
    temperatures_S1: Tensor
    states_S1: Tensor
    indices_S1: Tensor
    keep: Truncation
    _block: tuple[Tensor, ...] = ()

    def noise(self, step: int, count: int) -> Tensor:
        """The first `count` random numbers (float64 [S, L]) of step `step`.

        Those of several steps are computed at once: this takes about 20 operations for any count.
        """
        steps = max(1, min(BLOCK_STEPS, BLOCK_NUMBERS // (self.states_S1.shape[0] * count)))
        start = step % steps
        if start == 0 or not self._block:
            first = step - start
            steps_K11 = torch.arange(first, first + steps, device=self.states_S1.device).view(-1, 1, 1)
            self._block = exponentials(self.states_S1, self.indices_S1 + steps_K11, count).unbind()
        return self._block[start]


def draw_rows(scores_BV: Tensor, best: Likeliest, part: Sampling, step: int, out_B: Tensor) -> None:
    """Writes a token of each row of `part` to `out_B`, int64, which is 0 where rows fail and stays so.

    best: of all rows. step: of the batch. The scores can be of any floating dtype.
    """
    if scores_BV.is_cuda:
        # Triton exists where torch has CUDA, and takes seconds to import.
        from moe_worker.kernels.triton.draw import draw_tokens  # noqa: PLC0415

        draw_tokens(scores_BV, best, part, step, out_B)
    else:
        draw_plain(scores_BV, best, part, step, out_B)


def draw_plain(scores_BV: Tensor, best: Likeliest, part: Sampling, step: int, out_B: Tensor) -> None:
    """The reference of `draw_rows`, in plain torch on any device."""
    rows_S, vocab_size = part.rows_S, scores_BV.shape[1]
    whole = rows_S.shape[0] == scores_BV.shape[0]
    scores_SV = (scores_BV if whole else scores_BV.index_select(0, rows_S)).float()
    masses_SC = masses(scores_SV, best.peaks_B[rows_S].unsqueeze(1), part.temperatures_S1, part.keep)
    out_B.index_copy_(0, rows_S, draw(masses_SC, part.noise(step, lanes(vocab_size)), vocab_size))
    out_B.masked_fill_(best.failed_B, 0)


def lanes(vocab_size: int) -> int:
    """Random numbers of a draw: one for each place in a block, and one for each block."""
    return BLOCK + -(-vocab_size // BLOCK)


def exponentials(states_S1: Tensor, indices_S1: Tensor, count: int) -> Tensor:
    """randomness.exponential of the first `count` lanes: float64 [..., L].

    states_S1: randomness.mix of the seeds, as int64. indices_S1: int64; both broadcast to [..., 1].
    """
    lanes_L = torch.arange(count, device=states_S1.device)
    bits_SL = _split(_split(states_S1, indices_S1), lanes_L)
    uniform_SL = (_shifted(bits_SL, 64 - UNIFORM_BITS).double() + 0.5).mul_(2.0**-UNIFORM_BITS)
    noise_SL: Tensor = uniform_SL.log_().neg_()
    return noise_SL


def draw(masses_SC: Tensor, noise_SL: Tensor, vocab_size: int) -> Tensor:
    """One token a row (int64 [S]) from the distribution of `masses`, by numbers of `exponentials`."""
    masses_SNI: Tensor = masses_SC.unflatten(1, (-1, BLOCK))
    blocks_S = (masses_SNI.sum(dim=-1, dtype=torch.float64) / noise_SL[:, BLOCK:]).argmax(dim=-1)
    index_S1I = blocks_S.view(-1, 1, 1).expand(-1, 1, BLOCK)
    own_SI = masses_SNI.gather(1, index_S1I).squeeze(1)
    places_S = (own_SI / noise_SL[:, :BLOCK]).argmax(dim=-1)
    # The row of a sequence that fails can give any place.
    return (blocks_S * BLOCK + places_S).clamp(max=vocab_size - 1)


def masses(scores_SV: Tensor, peaks_S1: Tensor, temperatures_S1: Tensor, keep: Truncation) -> Tensor:
    """Likelihoods of the tokens that are kept, in steps of 2^-40 of the largest: float32 [S, C], integers.

    scores_SV: float32 logits. peaks_S1: the largest of each row; if it is not finite, neither are the masses.
    temperatures_S1: float32, at least MIN_TEMPERATURE. Places after the vocabulary are 0.
    """
    rows, vocab_size = scores_SV.shape
    weights_SC = scores_SV.new_empty(rows, -(-vocab_size // BLOCK) * BLOCK)
    weights_SC[:, vocab_size:].zero_()
    torch.sub(scores_SV, peaks_S1, out=weights_SC[:, :vocab_size]).div_(temperatures_S1)
    if not weights_SC.is_cuda:
        weights_SC[:, :vocab_size].clamp_(min=SURELY_ZERO)
    weights_SC[:, :vocab_size].exp_()
    masses_SC = weights_SC.mul_(UNIT).floor_()
    threshold_S1 = _threshold(masses_SC, keep)
    return masses_SC if threshold_S1 is None else masses_SC.masked_fill_(masses_SC < threshold_S1, 0)


def _threshold(masses_SC: Tensor, keep: Truncation) -> Tensor | None:
    """The mass (float32 [S, 1]) that a token must have to be kept; None: keep all."""
    kth_S1 = largest_SK = None
    if keep.top_k_S1 is not None:
        kth_S1, largest_SK = _kth(masses_SC, keep.top_k_S1, keep.largest_top_k)
    parts = [kth_S1, keep.min_mass_S1]
    if keep.top_p_S1 is not None:
        parts.append(_nucleus(masses_SC, keep.top_p_S1, keep.short, kth_S1, largest_SK))
    given = [part for part in parts if part is not None]
    return torch.stack(given).amax(dim=0) if given else None


def _kth(masses_SC: Tensor, top_k_S1: Tensor, largest: int) -> tuple[Tensor, Tensor | None]:
    """The k-th largest mass of each row (0 where k is 0), and the K largest, descending, if K is small."""
    if largest <= SHORT_TOP_K:
        largest_SK = masses_SC.topk(min(largest, masses_SC.shape[1]), dim=-1).values
        kth_S1 = largest_SK.gather(1, (top_k_S1 - 1).clamp(min=0))
    else:
        largest_SK = None
        ones_SC = torch.ones_like(masses_SC, dtype=torch.int64)
        kth_S1 = mass_threshold(masses_SC / UNIT, ones_SC, top_k_S1) * UNIT
    return kth_S1.masked_fill(top_k_S1 == 0, 0.0), largest_SK


def _nucleus(
    masses_SC: Tensor, top_p_S1: Tensor, short: bool, kth_S1: Tensor | None, largest_SK: Tensor | None
) -> Tensor:
    """The smallest mass in the smallest set that holds top_p of the mass that top-k keeps."""
    left_SC = masses_SC if kth_S1 is None else masses_SC.masked_fill(masses_SC < kth_S1, 0)
    targets_S1 = (left_SC.sum(dim=-1, keepdim=True, dtype=torch.float64) * top_p_S1).ceil().clamp(min=1)
    # `short` is only said where all rows concerned have a top_k, so both are there.
    if not short or largest_SK is None:
        return mass_threshold(masses_SC / UNIT, left_SC.long(), targets_S1.long()) * UNIT
    before_S1 = (largest_SK.cumsum(dim=-1, dtype=torch.float64) < targets_S1).sum(dim=-1, keepdim=True)
    # Beyond the K largest there are only tokens as likely as the last of them, or rows without top_p.
    found_S1 = largest_SK.gather(1, before_S1.clamp(max=largest_SK.shape[1] - 1))
    return found_S1.masked_fill(top_p_S1 == 1, 0.0)


def mass_threshold(weights_SV: Tensor, masses_SV: Tensor, targets_S1: Tensor) -> Tensor:
    """The largest weight (float32 [S, 1]) such that the tokens of at least that weight have the mass
    `targets_S1`.

    Examines the bit patterns of the weights 10 bits at a time, as radix sort does: three passes, with sums of
    masses_SV (int64, not negative) in 1024 bins. weights_SV: float32 in [0, 1]. A row whose total mass is
    below its target gets 0.
    """
    bits_SV = weights_SV.view(torch.int32)
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


def _split(states: Tensor, numbers: Tensor) -> Tensor:
    """randomness.split of each pair, as int64; of the shape that both broadcast to."""
    bits = states + (numbers + 1) * signed(GOLDEN)
    for shift, factor in ROUNDS:
        bits = (bits ^ _shifted(bits, shift)).mul_(signed(factor))
    return bits ^ _shifted(bits, LAST_SHIFT)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical right shift: int64 shifts in its sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
