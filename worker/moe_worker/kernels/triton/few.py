"""W4A8 products for the few tokens of a small decode step, without tensor cores.

With a token or two a step costs what its slowest chain of loads costs. A program here loads all it needs of
the weights at once, before it waits for its inputs, and multiplies in words of four int8 values (dp4a).

Legend: T tokens, K experts a token, M = T * K rows, G groups of 128 inputs, N outputs of a program, W = 16
words of a group, which hold its low nibbles (inputs 0 to 63) and its high ones (64 to 127).
"""

from typing import Any, NamedTuple, TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.launch import launch, wait_for_inputs
from moe_worker.kernels.triton.norm import Activation
from moe_worker.kernels.triton.tiles import COMPILED, Packed, PackedInt4, largest, round_even, scale_of
from moe_worker.quant.int4 import GROUP

# Tokens up to which these kernels are faster than those of tiles: each row of experts reads its own weights.
FEW_TOKENS = 4
FEW_TOKENS_OF_EXPERTS = 2
# Groups that a program's registers hold.
MOST_GROUPS = 64


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


@triton.jit
def _load_weights(words, scales, n, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """int32 [G, N, W] and float32 [G, N] of the outputs `n`, zeros behind the last group."""
    g, w = tl.arange(0, BLOCK_G), tl.arange(0, 16)
    row_GN = g[:, None] * OUTPUTS + n[None, :]
    inside_GN = (g < GROUPS)[:, None] & (n < OUTPUTS)[None, :]
    word_GNW = tl.load(
        words + row_GN[:, :, None] * 16 + w[None, None, :], mask=inside_GN[:, :, None], other=0
    )
    # Nibbles are dequantized as 16 times their value.
    return word_GNW, tl.load(scales + row_GN, mask=inside_GN, other=0.0) * 0.0625


@triton.jit
def _load_tokens(x, x_scale, token, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Words [G, W] of the low and the high inputs of each group of a token, and scales [G]."""
    g, w = tl.arange(0, BLOCK_G), tl.arange(0, 16)
    from_GW = x + (token * GROUPS + g)[:, None] * 32 + w[None, :]
    mask_GW = (g < GROUPS)[:, None]
    low_GW = tl.load(from_GW, mask=mask_GW, other=0)
    high_GW = tl.load(from_GW + 16, mask=mask_GW, other=0)
    return low_GW, high_GW, tl.load(x_scale + token * GROUPS + g, mask=g < GROUPS, other=0.0)


@triton.jit
def _multiply(word_GNW, scale_GN, low_GW, high_GW, scale_G):
    """Products [N] with one token."""
    dots_GNW = _dot8(word_GNW, low_GW[:, None, :], high_GW[:, None, :])
    sums_GN = tl.sum(dots_GNW, axis=2).to(tl.float32)
    return tl.sum(sums_GN * (scale_GN * scale_G[:, None]), axis=0)


@triton.jit
def load_four(values, mask_GW, STEP: tl.constexpr):
    """Each of `values` [G, W], and three that follow STEP apart, as a tuple."""
    four = ()
    for i in tl.static_range(4):
        four = four + (tl.load(values + i * STEP, mask=mask_GW, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return four


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def top_of_four(four):
    """The largest magnitudes [G, W]; NaN where a value is."""
    return _larger(_larger(tl.abs(four[0]), tl.abs(four[1])), _larger(tl.abs(four[2]), tl.abs(four[3])))


@triton.jit
def round_words(four, scale_GW):
    """Words [G, W] of four values each, rounded to int8."""
    word_GW = tl.zeros(four[0].shape, tl.int32)
    for i in tl.static_range(4):
        word_GW |= (round_even(four[i] / scale_GW).to(tl.int32) & 255) << (8 * i)
    return word_GW


@triton.jit
def _round_token(x, token, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """As `_load_tokens`, of a token in bf16, read as words of two values."""
    g, w = tl.arange(0, BLOCK_G), tl.arange(0, 16)
    from_GW, mask_GW = x + (token * GROUPS + g)[:, None] * 64 + w[None, :] * 2, (g < GROUPS)[:, None]
    low, high = _load_pairs(from_GW, mask_GW), _load_pairs(from_GW + 32, mask_GW)
    scale_G = scale_of(largest(_larger(top_of_four(low), top_of_four(high)), 1))
    return round_words(low, scale_G[:, None]), round_words(high, scale_G[:, None]), scale_G


@triton.jit
def _load_pairs(words, mask_GW):
    """The four bf16 values of two neighbours of `words` [G, W], in float32."""
    four = ()
    for i in tl.static_range(2):
        pair = tl.load(words + i, mask=mask_GW, other=0)
        first, second = (
            (pair << 16).to(tl.float32, bitcast=True),
            (pair & -65536).to(tl.float32, bitcast=True),
        )
        four = four + (first, second)  # type: ignore[assignment]  # noqa: RUF005
    return four


@triton.jit(do_not_specialize=["tokens"])
def _linear_few(
    x, x_scale, words, scales, out, tokens,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word_GNW, scale_GN = _load_weights(words, scales, n, OUTPUTS, GROUPS, BLOCK_G)
    wait_for_inputs()
    for token in range(tokens):
        if ROUNDED:
            low_GW, high_GW, scale_G = _load_tokens(x, x_scale, token, GROUPS, BLOCK_G)
        else:
            low_GW, high_GW, scale_G = _round_token(x, token, GROUPS, BLOCK_G)
        y_N = _multiply(word_GNW, scale_GN, low_GW, high_GW, scale_G)
        tl.store(out + token * OUTPUTS + n, y_N.to(out.dtype.element_ty), mask=n < OUTPUTS)


@triton.jit
def expert_of(
    experts, row, PER_TOKEN: tl.constexpr, ROUTED: tl.constexpr, FIRST: tl.constexpr, KNOWN: tl.constexpr
):
    """The expert of a row. KNOWN: whether the choice was written before the previous kernel; otherwise what
    the router chose must be waited for.
    """
    column = row % PER_TOKEN
    expert = FIRST + column - ROUTED
    if column < ROUTED:
        if not KNOWN:
            wait_for_inputs()
        expert = tl.load(experts + row)
    return expert.to(tl.int64)


@triton.jit
def _gate_up_few(
    x, x_scale, words, scales, experts, hidden,
    PER_TOKEN: tl.constexpr, ROUTED: tl.constexpr, FIRST: tl.constexpr, INNER: tl.constexpr,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    token = row // PER_TOKEN
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert_of(experts, row, PER_TOKEN, ROUTED, FIRST, False)
    if expert >= 0:
        own, own_scales = words + expert * STRIDE, scales + expert * (GROUPS * 2 * INNER)
        gate_GNW, gate_scale_GN = _load_weights(own, own_scales, n, 2 * INNER, GROUPS, BLOCK_G)
        up_GNW, up_scale_GN = _load_weights(own, own_scales, INNER + n, 2 * INNER, GROUPS, BLOCK_G)
        wait_for_inputs()
        low_GW, high_GW, scale_G = _load_tokens(x, x_scale, token, GROUPS, BLOCK_G)
        gate_N = _multiply(gate_GNW, gate_scale_GN, low_GW, high_GW, scale_G)
        up_N = _multiply(up_GNW, up_scale_GN, low_GW, high_GW, scale_G)
        tl.store(hidden + row * INNER + n, gate_N / (1.0 + tl.exp(-gate_N)) * up_N)


@triton.jit
def _down_few(
    hidden, words, scales, experts, shares, out,
    PER_TOKEN: tl.constexpr, ROUTED: tl.constexpr, FIRST: tl.constexpr, OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert_of(experts, row, PER_TOKEN, ROUTED, FIRST, True)
    if expert >= 0:
        own, own_scales = words + expert * STRIDE, scales + expert * (GROUPS * OUTPUTS)
        word_GNW, scale_GN = _load_weights(own, own_scales, n, OUTPUTS, GROUPS, BLOCK_G)
        wait_for_inputs()
        g, w = tl.arange(0, BLOCK_G), tl.arange(0, 16)
        from_GW, mask_GW = hidden + (row * GROUPS + g)[:, None] * 128 + w[None, :] * 4, (g < GROUPS)[:, None]
        low, high = load_four(from_GW, mask_GW, 1), load_four(from_GW + 64, mask_GW, 1)
        scale_G = scale_of(largest(_larger(top_of_four(low), top_of_four(high)), 1))
        low_GW, high_GW = round_words(low, scale_G[:, None]), round_words(high, scale_G[:, None])
        y_N = _multiply(word_GNW, scale_GN, low_GW, high_GW, scale_G)
        y_N *= tl.load(shares + row)
        tl.store(out + row * OUTPUTS + n, y_N.to(tl.bfloat16), mask=n < OUTPUTS)


def takes(weight: Tensor | Packed, x: Activation, most: int = FEW_TOKENS) -> TypeGuard[PackedInt4]:
    """Whether these kernels multiply `x`, of up to `most` tokens, by `weight`.

    They read one scale of `x` for each group. Values of heads have more where a head's are no whole groups.
    """
    return (
        x.x_TD.shape[0] <= most
        and x.piece == GROUP
        and isinstance(weight, PackedInt4)
        and weight.int8
        and weight.inputs % GROUP == 0
        and weight.groups <= MOST_GROUPS
    )


class Cut(NamedTuple):
    """How a product is cut: groups times outputs of a program, and its warps; measured as tiles are."""

    rows: int
    warps: int

    def options(self, weight: Packed) -> dict[str, int]:
        """Arguments of a launch."""
        block_g = triton.next_power_of_2(weight.groups)
        block_n = max(4, min(64, self.rows // block_g))
        return {
            "GROUPS": weight.groups, "BLOCK_G": block_g, "BLOCK_N": block_n, "num_warps": self.warps,
        }  # fmt: skip


LINEAR, GATE_UP, DOWN = Cut(256, 4), Cut(256, 4), Cut(512, 4)


def linear_few(x: Activation, weight: Packed, out_TO: Tensor, rounded: bool = True) -> None:
    """Writes x W^T to `out_TO` (any floating dtype), as `linear_packed` does; `takes` says whether it can.

    rounded: whether `x` has its int8 side; otherwise the kernel rounds the bf16 one.
    """
    tokens, options = x.x_TD.shape[0], LINEAR.options(weight)
    _linear_few[(triton.cdiv(weight.outputs, options["BLOCK_N"]),)](
        (x.q_TD if rounded else x.x_TD).view(torch.int32), x.scales_TX, weight.stored.view(torch.int32),
        weight.scales, out_TO, tokens, OUTPUTS=weight.outputs, ROUNDED=rounded, **options, **launch(tokens),
    )  # fmt: skip


class Taken(NamedTuple):
    """Experts int32 [T, K] of each token, the first `routed` of which the router chose.

    Those behind are `first`, `first` + 1 ... for every token: their weights are read before the choice is
    known.
    """

    experts_TK: Tensor
    routed: int
    first: int


def gate_up_few(x: Activation, gate_up: Packed, taken: Taken) -> Tensor:
    """Hidden values of each row, float32 [M, I]; rows of expert -1 are not written."""
    return launch_gate_up(_gate_up_few, x, gate_up, taken, GATE_UP.options(gate_up))


def launch_gate_up(
    kernel: Any, x: Activation, gate_up: Packed, taken: Taken, options: dict[str, int]
) -> Tensor:
    """See gate_up_few. kernel: that of the format of `gate_up`; options: of its launch."""
    (tokens, per_token), inner = taken.experts_TK.shape, gate_up.outputs // 2
    rows = tokens * per_token
    hidden_MI = torch.empty(rows, inner, dtype=torch.float32, device=x.x_TD.device)
    kernel[(inner // options["BLOCK_N"], rows)](
        x.q_TD.view(torch.int32), x.scales_TX, gate_up.stored.view(torch.int32), gate_up.scales,
        taken.experts_TK, hidden_MI, PER_TOKEN=per_token, ROUTED=taken.routed,
        FIRST=taken.first, INNER=inner, STRIDE=gate_up.stride // 4, **options, **launch(tokens),
    )  # fmt: skip
    return hidden_MI


def down_few(hidden_MI: Tensor, down: Packed, taken: Taken, weights_TK: Tensor) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D], of hidden values rounded to int8 in groups."""
    return launch_down(_down_few, hidden_MI, down, taken, weights_TK, DOWN.options(down))


def launch_down(
    kernel: Any, hidden_MI: Tensor, down: Packed, taken: Taken, weights_TK: Tensor, options: dict[str, int]
) -> Tensor:
    """See down_few. kernel: that of the format of `down`; options: of its launch."""
    tokens, per_token = taken.experts_TK.shape
    rows = tokens * per_token
    out_MD = torch.empty(rows, down.outputs, dtype=torch.bfloat16, device=hidden_MI.device)
    kernel[(triton.cdiv(down.outputs, options["BLOCK_N"]), rows)](
        hidden_MI, down.stored.view(torch.int32), down.scales, taken.experts_TK, weights_TK, out_MD,
        PER_TOKEN=per_token, ROUTED=taken.routed, FIRST=taken.first, OUTPUTS=down.outputs,
        STRIDE=down.stride // 4, **options, **launch(tokens),
    )  # fmt: skip
    return out_MD


def experts_few(x: Activation, gate_up: Packed, down: Packed, taken: Taken, weights_TK: Tensor) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D], to be summed over K, as `experts_packed` gives them.

    Rows of expert -1 are not written.
    """
    return down_few(gate_up_few(x, gate_up, taken), down, taken, weights_TK)
