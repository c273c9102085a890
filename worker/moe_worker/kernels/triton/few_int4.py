"""Products of one token with int4 weights, without tensor cores, for few.py.

`weights` of a function are values int32 [G, N, W] and scales [G, N]; a `token` is the words [G, W] of its low
and of its high inputs, and scales [G].

Legend: G groups of 128 inputs, N outputs of a program, W = 16 words of a group, which hold its low nibbles
(inputs 0 to 63) and its high ones (64 to 127).
"""

import triton
import triton.language as tl

from moe_worker.kernels.triton.few_words import larger, load_four, load_four_bf16, round_words, top_of_four
from moe_worker.kernels.triton.tiles import COMPILED, largest, scale_of


@triton.jit
def load_weights(words, scales, n, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Weights of the outputs `n`, zeros behind the last group."""
    g, w = tl.arange(0, BLOCK_G), tl.arange(0, 16)
    row_GN = g[:, None] * OUTPUTS + n[None, :]
    inside_GN = (g < GROUPS)[:, None] & (n < OUTPUTS)[None, :]
    word_GNW = tl.load(
        words + row_GN[:, :, None] * 16 + w[None, None, :], mask=inside_GN[:, :, None], other=0
    )
    # Nibbles are dequantized as 16 times their value.
    return word_GNW, tl.load(scales + row_GN, mask=inside_GN, other=0.0) * 0.0625


@triton.jit
def load_token(x, x_scale, token, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """A token that was rounded to int8."""
    g, w = tl.arange(0, BLOCK_G), tl.arange(0, 16)
    from_GW = x + (token * GROUPS + g)[:, None] * 32 + w[None, :]
    mask_GW = (g < GROUPS)[:, None]
    low_GW = tl.load(from_GW, mask=mask_GW, other=0)
    high_GW = tl.load(from_GW + 16, mask=mask_GW, other=0)
    return low_GW, high_GW, tl.load(x_scale + token * GROUPS + g, mask=g < GROUPS, other=0.0)


@triton.jit
def round_token(x, token, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """A token in bf16, read as words of two values."""
    g, w = tl.arange(0, BLOCK_G), tl.arange(0, 16)
    from_GW, mask_GW = x + (token * GROUPS + g)[:, None] * 64 + w[None, :] * 2, (g < GROUPS)[:, None]
    return _rounded(load_four_bf16(from_GW, mask_GW), load_four_bf16(from_GW + 32, mask_GW))


@triton.jit
def round_hidden(hidden, row, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Hidden values of a row, in float32."""
    g, w = tl.arange(0, BLOCK_G), tl.arange(0, 16)
    from_GW, mask_GW = hidden + (row * GROUPS + g)[:, None] * 128 + w[None, :] * 4, (g < GROUPS)[:, None]
    return _rounded(load_four(from_GW, mask_GW, 1), load_four(from_GW + 64, mask_GW, 1))


@triton.jit
def _rounded(low, high):
    scale_G = scale_of(largest(larger(top_of_four(low), top_of_four(high)), 1))
    return round_words(low, scale_G[:, None]), round_words(high, scale_G[:, None]), scale_G


@triton.jit
def multiply(weights, token):
    """Products [N]."""
    dots_GNW = _dot8(weights[0], token[0][:, None, :], token[1][:, None, :])
    sums_GN = tl.sum(dots_GNW, axis=2).to(tl.float32)
    return tl.sum(sums_GN * (weights[1] * token[2][:, None]), axis=0)


@triton.jit
def _dot8(word, low, high):
    """16 times the sums of eight products: nibbles of `word` with the int8 values of `low` and of `high`."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; shl.b32 a, $1, 4; and.b32 a, a, 0xF0F0F0F0; and.b32 b, $1, 0xF0F0F0F0; "
            "dp4a.s32.s32 a, a, $2, 0; dp4a.s32.s32 $0, b, $3, a; }",
            "=r,r,r,r", [word, low, high], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    total = (word + low + high) * 0
    for i in tl.static_range(4):
        total += ((word << (28 - 8 * i)) >> 28) * ((low << (24 - 8 * i)) >> 24)
        total += ((word << (24 - 8 * i)) >> 28) * ((high << (24 - 8 * i)) >> 24)
    return total * 16
