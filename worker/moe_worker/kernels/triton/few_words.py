"""Words of four int8 values, made of four floating-point ones, for the kernels for few tokens (few.py).

Legend: G groups of inputs (or pairs of groups), W words of each.
"""

import triton
import triton.language as tl

from moe_worker.kernels.triton.tiles import round_even


@triton.jit
def load_four(values, mask_GW, STEP: tl.constexpr):
    """Each of `values` [G, W], and three that follow STEP apart, as a tuple."""
    four = ()
    for i in tl.static_range(4):
        four = four + (tl.load(values + i * STEP, mask=mask_GW, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return four


@triton.jit
def load_four_bf16(pairs, mask_GW):
    """The four bf16 values of `pairs` [G, W], which points to words of two, and the next, in float32."""
    four = ()
    for i in tl.static_range(2):
        pair = tl.load(pairs + i, mask=mask_GW, other=0)
        first, second = (
            (pair << 16).to(tl.float32, bitcast=True),
            (pair & -65536).to(tl.float32, bitcast=True),
        )
        four = four + (first, second)  # type: ignore[assignment]  # noqa: RUF005
    return four


@triton.jit
def larger(a, b):
    """The larger value; NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def top_of_four(four):
    """The largest magnitudes [G, W]; NaN where a value is."""
    return larger(larger(tl.abs(four[0]), tl.abs(four[1])), larger(tl.abs(four[2]), tl.abs(four[3])))


@triton.jit
def round_words(four, scale_GW):
    """Words [G, W] of four values each, rounded to int8."""
    word_GW = tl.zeros(four[0].shape, tl.int32)
    for i in tl.static_range(4):
        word_GW |= (round_even(four[i] / scale_GW).to(tl.int32) & 255) << (8 * i)
    return word_GW
