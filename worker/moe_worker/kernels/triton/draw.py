"""Draws tokens on a GPU as kernels/draw.py, the reference, does.

A pass over the scores sums the masses of each block; a second kernel draws a block by these sums, and then a
token of it. Masses are integers of at most 2^40, so their sums are exact in any order, and the noise is a
function of seed, index and lane. So a token differs from the reference's only where exp or log rounds in
another way. CUDA's functions are used, which torch uses, too.

Truncation takes two more passes, and nothing is sorted: the pass that sums also counts masses in bins. These
counts bound a row's threshold from both sides. The second pass lists the masses between the bounds, and sums
those above; then one program for each row bisects the list, and the third pass sums what is kept. FlashInfer
does not sort either, but rejects tokens until one is kept, which needs other noise than the reference has
(https://flashinfer.ai/2025/03/10/sampling.html).

Legend: B rows of the batch, S rows that sample, V vocabulary, N blocks of BLOCK tokens, E blocks of one
program, I tokens of a block, G groups of T tokens, or T tokens of one program, D bins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels import draw, randomness
from moe_worker.kernels.likeliest import Likeliest
from moe_worker.kernels.triton.greedy import best_tokens
from moe_worker.kernels.triton.tiles import COMPILED

BLOCK, UNIT = tl.constexpr(draw.BLOCK), tl.constexpr(draw.UNIT)
SURELY_ZERO = tl.constexpr(draw.SURELY_ZERO)
GOLDEN = tl.constexpr(randomness.GOLDEN)
(SHIFT_1, FACTOR_1), (SHIFT_2, FACTOR_2) = (map(tl.constexpr, each) for each in randomness.ROUNDS)
LAST_SHIFT, UNUSED_BITS = tl.constexpr(randomness.LAST_SHIFT), tl.constexpr(64 - randomness.UNIFORM_BITS)
STEP = tl.constexpr(2.0**-randomness.UNIFORM_BITS)
# Blocks of one program, and tokens.
EACH = tl.constexpr(16)
TOKENS = tl.constexpr(EACH.value * BLOCK.value)
# Bins of masses: two in an octave from 1 to 2^24, four in one up to 2^40, where the thresholds of most rows
# are. A bin is known by the upper bits of its float32, of which quarters of octaves differ in the last.
BINS, COARSE_BINS = tl.constexpr(128), tl.constexpr(24 * 2)
BIN_SHIFT, BIN_OF_1 = tl.constexpr(21), tl.constexpr(127 * 4)
# Tallies of a row, int64: the masses in each bin; the mass of the row; the bits of float32 between which its
# threshold lies; how many masses are listed, and the sum of those above.
TOTAL, LOW, HIGH, LISTED, ABOVE, TALLIES = (tl.constexpr(BINS.value + each) for each in range(6))
# Share of all mass by which bounds may be off, since sums over bins are rounded.
SLACK = tl.constexpr(1e-12)


@triton.jit
def _split(state, number):
    """See randomness.split; uint64."""
    bits = state + (number.to(tl.uint64) + 1) * GOLDEN
    bits = (bits ^ (bits >> SHIFT_1)) * FACTOR_1
    bits = (bits ^ (bits >> SHIFT_2)) * FACTOR_2
    return bits ^ (bits >> LAST_SHIFT)


@triton.jit
def _exponential(state, lane):
    """See randomness.exponential; float64."""
    return -tl.log(((_split(state, lane) >> UNUSED_BITS).to(tl.float64) + 0.5) * STEP)


@triton.jit
def _weights(scores, stride, row, v, vocabulary, peaks, temperature):
    """Likelihoods of the tokens `v` of a row, as draw.masses, but not yet whole numbers."""
    score = tl.load(scores + row * stride + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
    power = score - tl.load(peaks + row)
    if COMPILED:
        # Multiplied by the reciprocal and corrected by the remainder, a quotient is rounded as if divided
        # (Markstein 1990), in three instructions. -inf would leave no remainder.
        power = tl.maximum(power, temperature * SURELY_ZERO)
        inverse = tl.div_rn(1.0, temperature)
        quotient = power * inverse
        quotient = tl.fma(tl.fma(-quotient, temperature, power), inverse, quotient)
        weight = tl.extra.cuda.libdevice.exp(quotient)
    else:
        weight = tl.exp(power / temperature)
    return weight * UNIT


@triton.jit
def _kept(weights, thresholds, place):
    """0 instead of weights below the threshold, a whole number, of a row; `thresholds`: None keeps all."""
    kept = weights
    if thresholds is not None:
        kept = tl.where(weights < tl.load(thresholds + place), 0.0, weights)
    return kept


@triton.jit
def _sum_blocks(scores, stride, rows, peaks, temperatures, thresholds, tallies, sums, vocabulary):
    """The mass of each block, of what `thresholds` (None: all) keep. `tallies`: counts of bins, or None."""
    place, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks, block_E = tl.cdiv(vocabulary, BLOCK), part * EACH + tl.arange(0, EACH)
    v_EI = block_E[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, temperature = tl.load(rows + place), tl.load(temperatures + place)
    weight_EI = _weights(scores, stride, row, v_EI, vocabulary, peaks, temperature)
    kept_EI = _kept(weight_EI, thresholds, place)
    # Conversion cuts off the fraction.
    sum_E = tl.sum(kept_EI.to(tl.int64), axis=1).to(tl.float64)
    tl.store(sums + place * blocks + block_E, sum_E, mask=block_E < blocks)
    if tallies is not None:
        mass_T = tl.floor(tl.reshape(weight_EI, (TOKENS,), can_reorder=True))
        count_D = tl.histogram(_bin(mass_T), BINS, mask=mass_T >= 1.0)
        to = tallies + place * TALLIES + tl.arange(0, BINS)
        tl.atomic_add(to, count_D.to(tl.int64), mask=count_D > 0, sem="relaxed")


@triton.jit
def _bin(mass):
    """The bin of a mass of at least 1."""
    quarter = (mass.to(tl.int32, bitcast=True) >> BIN_SHIFT) - BIN_OF_1
    return tl.where(quarter < 2 * COARSE_BINS, quarter >> 1, quarter - COARSE_BINS)


@triton.jit
def _least_bits(number):
    """The bits of the smallest mass of bin `number`."""
    quarter = tl.where(number < COARSE_BINS, number * 2, number + COARSE_BINS)
    return (quarter + BIN_OF_1) << BIN_SHIFT


@triton.jit
def _bound(limits, tallies, sums, vocabulary, BLOCK_N: tl.constexpr):
    """Bounds each row's threshold by its counts.

    With top-k, the upper bound is that of all masses: the nucleus is a part of what top-k keeps.
    """
    place = tl.program_id(0).to(tl.int64)
    top_k, top_p = tl.load(limits + place * 3), tl.load(limits + place * 3 + 1)
    blocks, n = tl.cdiv(vocabulary, BLOCK), tl.arange(0, BLOCK_N)
    total = tl.sum(tl.load(sums + place * blocks + n, mask=n < blocks, other=0.0), axis=0)
    tallies += place * TALLIES
    d = tl.arange(0, BINS)
    count_D = tl.load(tallies + d)
    if top_k > 0:
        first = tl.max(tl.where(tl.cumsum(count_D, 0, reverse=True) >= top_k, d, 0), axis=0)
        low, high = _least_bits(first), _least_bits(tl.max(d, axis=0))
    else:
        least_D = count_D.to(tl.float64) * _least_bits(d).to(tl.float32, bitcast=True)
        most_D = count_D.to(tl.float64) * _least_bits(d + 1).to(tl.float32, bitcast=True)
        # The mass from a bin on: at least and at most that of these bins, and what those below leave of all.
        least_on_D, most_on_D = tl.cumsum(least_D, 0, reverse=True), tl.cumsum(most_D, 0, reverse=True)
        surely_D = tl.maximum(least_on_D, total - (tl.sum(most_D, axis=0) - most_on_D))
        maybe_D = tl.minimum(most_on_D, total - (tl.sum(least_D, axis=0) - least_on_D))
        target, slack = total * top_p, total * SLACK + 1.0
        first = tl.max(tl.where(surely_D >= target + slack, d, 0), axis=0)
        last = tl.max(tl.where(maybe_D >= target - slack, d, 0), axis=0)
        # If every token had less than this, all together would not have the mass that top-p leaves out.
        least = ((1.0 - top_p) * total / vocabulary * 0.999).to(tl.float32)
        low = tl.maximum(_least_bits(first), least.to(tl.int32, bitcast=True))
        high = _least_bits(last + 1)
    tl.store(tallies + TOTAL, total.to(tl.int64))
    tl.store(tallies + LOW, low.to(tl.int64))
    tl.store(tallies + HIGH, high.to(tl.int64))


@triton.jit
def _list_masses(scores, stride, rows, peaks, temperatures, tallies, listed, vocabulary):
    """Lists the masses between a row's bounds, in any order, and sums those above."""
    place, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # In groups of 16, within which and over which it takes less than over all to count what stands before.
    group_G = tl.arange(0, TOKENS // 16)
    v_GT = part * TOKENS + group_G[:, None] * 16 + tl.arange(0, 16)[None, :]
    row, temperature = tl.load(rows + place), tl.load(temperatures + place)
    mass_GT = tl.floor(_weights(scores, stride, row, v_GT, vocabulary, peaks, temperature))
    tallies += place * TALLIES
    low, high = tl.load(tallies + LOW).to(tl.int32), tl.load(tallies + HIGH).to(tl.int32)
    bits_GT = mass_GT.to(tl.int32, bitcast=True)
    above_GT = tl.where(bits_GT >= high, mass_GT, 0.0).to(tl.int64)
    tl.atomic_add(tallies + ABOVE, tl.sum(above_GT), sem="relaxed")
    inside_GT = ((bits_GT >= low) & (bits_GT < high)).to(tl.int32)
    inside_G = tl.sum(inside_GT, axis=1)
    begin = tl.atomic_add(tallies + LISTED, tl.sum(inside_G, axis=0).to(tl.int64), sem="relaxed")
    before_G = tl.cumsum(inside_G, axis=0) - inside_G
    to_GT = before_G[:, None] + tl.cumsum(inside_GT, axis=1) - 1
    tl.store(listed + place * vocabulary + begin + to_GT, mass_GT, mask=inside_GT > 0)


@triton.jit
def _measure(mass_T, bits, COUNTED: tl.constexpr):
    """How many masses have at least these bits, or their sum; int64."""
    reach_T = mass_T >= bits.to(tl.float32, bitcast=True)
    return tl.sum(reach_T.to(tl.int64) if COUNTED else tl.where(reach_T, mass_T.to(tl.int64), 0), axis=0)


@triton.jit
def _measure_list(head_T, listed, length, bits, COUNTED: tl.constexpr):
    measured = _measure(head_T, bits, COUNTED)
    for start in range(TOKENS, length, TOKENS):
        i = start + tl.arange(0, TOKENS)
        measured += _measure(tl.load(listed + i, mask=i < length, other=0.0), bits, COUNTED)
    return measured


@triton.jit
def _bisect(head_T, listed, length, low, high, target, COUNTED: tl.constexpr):
    """The largest bits in [low, high) that masses of the measure `target` have at least."""
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = _measure_list(head_T, listed, length, middle, COUNTED) >= target
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low


@triton.jit
def _find_thresholds(limits, tallies, listed, thresholds, vocabulary):
    """The mass that a row's tokens must have to be kept."""
    place = tl.program_id(0).to(tl.int64)
    limits += place * 3
    top_k, top_p, threshold = tl.load(limits), tl.load(limits + 1), tl.load(limits + 2).to(tl.float32)
    tallies += place * TALLIES
    listed += place * vocabulary
    length, i = tl.load(tallies + LISTED).to(tl.int32), tl.arange(0, TOKENS)
    head_T = tl.load(listed + i, mask=i < length, other=0.0)
    low, high = tl.load(tallies + LOW).to(tl.int32), tl.load(tallies + HIGH).to(tl.int32)
    total = tl.load(tallies + TOTAL)
    if (top_k > 0) & (top_k <= length):
        low = _bisect(head_T, listed, length, low, high, top_k.to(tl.int64), True)
        threshold = tl.maximum(threshold, low.to(tl.float32, bitcast=True))
        total = _measure_list(head_T, listed, length, low, False)
    if top_p < 1.0:
        target = tl.maximum(tl.ceil(total.to(tl.float64) * top_p), 1.0).to(tl.int64)
        low = _bisect(head_T, listed, length, low, high, target - tl.load(tallies + ABOVE), False)
        threshold = tl.maximum(threshold, low.to(tl.float32, bitcast=True))
    tl.store(thresholds + place, threshold)


@triton.jit(do_not_specialize=["step"])
def _choose(
    scores, stride, rows, peaks, temperatures, thresholds, failed, states, indices, sums, out, vocabulary,
    step, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Draws a block by its mass, and a token of it."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    if tl.load(failed + row):
        return
    state = _split(tl.load(states + place).to(tl.uint64, bitcast=True), tl.load(indices + place) + step)
    n, i, blocks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK), tl.cdiv(vocabulary, BLOCK)
    sum_N = tl.load(sums + place * blocks + n, mask=n < blocks, other=-1.0)
    v_I = tl.argmax(sum_N / _exponential(state, n + BLOCK), axis=0) * BLOCK + i
    weight_I = _weights(scores, stride, row, v_I, vocabulary, peaks, tl.load(temperatures + place))
    mass_I = tl.floor(_kept(weight_I, thresholds, place))
    chosen = tl.argmax(mass_I / _exponential(state, i), axis=0)
    tl.store(out + row, tl.max(tl.where(i == chosen, v_I, 0), axis=0).to(tl.int64))


def draw_tokens(scores_BV: Tensor, best: Likeliest, part: draw.Sampling, step: int, out_B: Tensor) -> None:
    """See draw.draw_rows."""
    count, vocabulary = part.rows_S.shape[0], scores_BV.shape[1]
    blocks = triton.cdiv(vocabulary, draw.BLOCK)
    padded, grid = triton.next_power_of_2(blocks), (count, triton.cdiv(blocks, EACH.value))
    scores = (scores_BV, scores_BV.stride(0), part.rows_S, best.peaks_B, part.temperatures_S1)
    sums_SN = scores_BV.new_empty(count, blocks, dtype=torch.float64)
    keep, thresholds_S1 = part.keep, part.keep.min_mass_S1
    if keep.limits_S3 is not None:
        tallies_SD = scores_BV.new_zeros(count, TALLIES.value, dtype=torch.int64)
        listed_SV = scores_BV.new_empty(count, vocabulary, dtype=torch.float32)
        thresholds_S1 = torch.empty_like(part.temperatures_S1)
        _sum_blocks[grid](*scores, None, tallies_SD, sums_SN, vocabulary, num_warps=4)
        _bound[count,](keep.limits_S3, tallies_SD, sums_SN, vocabulary, BLOCK_N=padded, num_warps=8)
        _list_masses[grid](*scores, tallies_SD, listed_SV, vocabulary, num_warps=8)
        _find_thresholds[count,](
            keep.limits_S3, tallies_SD, listed_SV, thresholds_S1, vocabulary, num_warps=8
        )
    _sum_blocks[grid](*scores, thresholds_S1, None, sums_SN, vocabulary, num_warps=4)
    _choose[count,](
        *scores, thresholds_S1, best.failed_B, part.states_S1, part.indices_S1, sums_SN, out_B, vocabulary,
        step, BLOCK_N=padded, num_warps=4,
    )  # fmt: skip


def warm(vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles the kernels for logits of `dtype` and for float32, to which penalties turn them: the first
    requests would wait for it.
    """
    numbers_S1 = torch.zeros(1, 1, dtype=torch.int64, device=device)
    ones_S1 = torch.ones(1, 1, device=device)
    limits_S3 = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64, device=device)
    keeps = (draw.Truncation(), draw.Truncation(limits_S3=limits_S3))
    for each in {dtype, torch.float32}:
        scores_BV = torch.zeros(1, vocabulary, dtype=each, device=device)
        best = Likeliest(*best_tokens(scores_BV))
        for keep in keeps:
            part = draw.Sampling(numbers_S1[0], ones_S1, numbers_S1, numbers_S1, keep)
            draw_tokens(scores_BV, best, part, 0, torch.empty_like(best.tokens_B))
