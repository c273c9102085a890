"""Products of one token with 1:4 sparse weights, without tensor cores, for few.py.

`weights` of a function are values of the first and of the second groups of pairs, and positions, int32
[P, N, W], and scales [P, N] of the first and of the second groups; a `token` is its words [P, B] and scales
[P] of the first and of the second groups.

Legend: G groups of 128 inputs, P pairs of groups, N outputs of a program, W = 4 words of a row of bytes of a
pair (see PackedSparse14), B = 64 words of inputs `by_position` of a pair.
"""

import triton
import triton.language as tl

from moe_worker.kernels.triton.few_words import load_four, round_words, top_of_four
from moe_worker.kernels.triton.products import placing
from moe_worker.kernels.triton.tiles import COMPILED, largest, scale_of

_MULTIPLYING = tl.constexpr(
    tuple(f"{{ {placing(number)} dp4a.s32.s32 $0, v, $3, $4; }}" for number in range(16))
)


@triton.jit
def load_weights(words, scales, n, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Weights of the outputs `n`, zeros behind the last group."""
    p, w = tl.arange(0, BLOCK_P), tl.arange(0, 4)
    from_PN = p[:, None] * (3 * OUTPUTS) + n[None, :]
    own_PNW = words + from_PN[:, :, None] * 4 + w[None, None, :]
    mask_PN = (p * 2 < GROUPS)[:, None] & (n < OUTPUTS)[None, :]
    mask_second_PN = (p * 2 + 1 < GROUPS)[:, None] & (n < OUTPUTS)[None, :]
    first_PNW = tl.load(own_PNW, mask=mask_PN[:, :, None], other=0)
    second_PNW = tl.load(own_PNW + OUTPUTS * 4, mask=mask_second_PN[:, :, None], other=0)
    places_PNW = tl.load(own_PNW + 2 * OUTPUTS * 4, mask=mask_PN[:, :, None], other=0)
    from_scale_PN = scales + p[:, None] * (2 * OUTPUTS) + n[None, :]
    # Values are placed as 16 times what they are.
    first_scale_PN = tl.load(from_scale_PN, mask=mask_PN, other=0.0) * 0.0625
    second_scale_PN = tl.load(from_scale_PN + OUTPUTS, mask=mask_second_PN, other=0.0) * 0.0625
    return first_PNW, second_PNW, places_PNW, first_scale_PN, second_scale_PN


@triton.jit
def load_token(x, x_scale, token, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr):
    """A token that was rounded to int8, `by_position`."""
    p, b = tl.arange(0, BLOCK_P), tl.arange(0, 64)
    from_PB = p[:, None] * 64 + b[None, :]
    x_PB = tl.load(x + token * (GROUPS * 32) + from_PB, mask=from_PB < GROUPS * 32, other=0)
    from_P = x_scale + token * GROUPS + p * 2
    first_P = tl.load(from_P, mask=p * 2 < GROUPS, other=0.0)
    return x_PB, first_P, tl.load(from_P + 1, mask=p * 2 + 1 < GROUPS, other=0.0)


@triton.jit
def round_hidden(hidden, row, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Hidden values of a row, in float32 and in their own order."""
    p, b = tl.arange(0, BLOCK_P), tl.arange(0, 64)
    # Of 64 inputs: byte e of word w of position i is input 16 w + 4 e + i.
    from_B = b // 16 * 64 + b % 4 * 16 + b // 4 % 4
    four = load_four(
        hidden + row * (GROUPS * 128) + p[:, None] * 256 + from_B[None, :],
        (p[:, None] * 2 + (b // 32)[None, :]) < GROUPS, 4,
    )  # fmt: skip
    is_first_B, top_PB = (b < 32)[None, :], top_of_four(four)
    first_P = scale_of(largest(tl.where(is_first_B, top_PB, 0.0), 1))
    second_P = scale_of(largest(tl.where(is_first_B, 0.0, top_PB), 1))
    scale_PB = tl.where(is_first_B, first_P[:, None], second_P[:, None])
    return round_words(four, scale_PB), first_P, second_P


@triton.jit
def multiply(weights, token):
    """Products [N]."""
    cut = tl.permute(tl.reshape(token[0], (token[0].shape[0], 2, 2, 2, 2, 4)), (0, 5, 1, 2, 3, 4))
    x = _halved(_halved(_halved(_halved((cut,)))))
    y_N = tl.zeros((weights[0].shape[1],), tl.float32)
    for group in tl.static_range(2):
        dots_PNW = tl.zeros(weights[0].shape, tl.int32)
        for i in tl.static_range(8):
            x_PW = x[group * 8 + i]
            dots_PNW = _add_placed(dots_PNW, weights[group], weights[2], x_PW[:, None, :], group * 8 + i)
        scale_PN = weights[3 + group] * token[1 + group][:, None]
        y_N += tl.sum(tl.sum(dots_PNW, axis=2).to(tl.float32) * scale_PN, axis=0)
    return y_N


@triton.jit
def _halved(tensors):
    """First halves, along their last axis, of all tensors, then second ones."""
    first, second = (), ()
    for i in tl.static_range(len(tensors)):
        low, high = tl.split(tensors[i])
        first = first + (low,)  # type: ignore[assignment]  # noqa: RUF005
        second = second + (high,)  # type: ignore[assignment]  # noqa: RUF005
    return first + second


@triton.jit
def _add_placed(total, values, places, x, NUMBER: tl.constexpr):
    """Adds 16 times the sums of four products: values with one position with the int8 values of `x`."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            _MULTIPLYING[NUMBER], "=r,r,r,r,r", [values, places, x, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    for i in tl.static_range(4):
        own = (values << (28 - 8 * i if NUMBER // 4 % 2 == 0 else 24 - 8 * i)) >> 28
        there = (places >> (8 * i + 6 - NUMBER // 4 * 2)) & 3 == NUMBER % 4
        total += tl.where(there, own, 0) * ((x << (24 - 8 * i)) >> 24) * 16
    return total
