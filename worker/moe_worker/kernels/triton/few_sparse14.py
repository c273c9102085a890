"""As the kernels for few tokens (few.py), for experts with 1:4 sparse weights.

Legend: K experts a token, M = T * K rows, G groups of 128 inputs, P pairs of groups, N outputs of a program,
W = 4 words of a row of bytes of a pair (see PackedSparse14), B = 64 words of inputs `by_position` of a pair.
"""

from typing import TypeGuard

import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.few import (
    MOST_GROUPS,
    Cut,
    Taken,
    expert_of,
    launch_down,
    launch_gate_up,
    load_four,
    round_words,
    top_of_four,
)
from moe_worker.kernels.triton.launch import wait_for_inputs
from moe_worker.kernels.triton.norm import Activation
from moe_worker.kernels.triton.tiles import COMPILED, Packed, PackedSparse14, largest, placing, scale_of

_MULTIPLYING = tl.constexpr(
    tuple(f"{{ {placing(number)} dp4a.s32.s32 $0, v, $3, $4; }}" for number in range(16))
)


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


@triton.jit
def _load_pairs(words, scales, n, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of pairs: values of their first groups, of their second, and positions, int32 [P, N, W]; scales [P, N]
    of their first groups, and of their second.
    """
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
def _halved(tensors):
    """First halves, along their last axis, of all tensors, then second ones."""
    first, second = (), ()
    for i in tl.static_range(len(tensors)):
        low, high = tl.split(tensors[i])
        first = first + (low,)  # type: ignore[assignment]  # noqa: RUF005
        second = second + (high,)  # type: ignore[assignment]  # noqa: RUF005
    return first + second


@triton.jit
def _multiply(pairs, x_PB, first_P, second_P):
    """Products [N] with a token's words [P, B] and its scales of the first and of the second groups."""
    cut = tl.permute(tl.reshape(x_PB, (x_PB.shape[0], 2, 2, 2, 2, 4)), (0, 5, 1, 2, 3, 4))
    x = _halved(_halved(_halved(_halved((cut,)))))
    y_N = tl.zeros((pairs[0].shape[1],), tl.float32)
    for group in tl.static_range(2):
        dots_PNW = tl.zeros(pairs[0].shape, tl.int32)
        for i in tl.static_range(8):
            x_PW = x[group * 8 + i]
            dots_PNW = _add_placed(dots_PNW, pairs[group], pairs[2], x_PW[:, None, :], group * 8 + i)
        scale_PN = pairs[3 + group] * (first_P if group == 0 else second_P)[:, None]
        y_N += tl.sum(tl.sum(dots_PNW, axis=2).to(tl.float32) * scale_PN, axis=0)
    return y_N


@triton.jit
def _gate_up_few(
    x, x_scale, words, scales, experts, hidden,
    PER_TOKEN: tl.constexpr, ROUTED: tl.constexpr, FIRST: tl.constexpr, INNER: tl.constexpr,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    token = row // PER_TOKEN
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert_of(experts, row, PER_TOKEN, ROUTED, FIRST, False)
    if expert >= 0:
        own, own_scales = words + expert * STRIDE, scales + expert * (GROUPS * 2 * INNER)
        gate = _load_pairs(own, own_scales, n, 2 * INNER, GROUPS, BLOCK_P)
        up = _load_pairs(own, own_scales, INNER + n, 2 * INNER, GROUPS, BLOCK_P)
        wait_for_inputs()
        p, b = tl.arange(0, BLOCK_P), tl.arange(0, 64)
        from_PB = p[:, None] * 64 + b[None, :]
        x_PB = tl.load(x + token * (GROUPS * 32) + from_PB, mask=from_PB < GROUPS * 32, other=0)
        from_P = x_scale + token * GROUPS + p * 2
        first_P = tl.load(from_P, mask=p * 2 < GROUPS, other=0.0)
        second_P = tl.load(from_P + 1, mask=p * 2 + 1 < GROUPS, other=0.0)
        gate_N, up_N = _multiply(gate, x_PB, first_P, second_P), _multiply(up, x_PB, first_P, second_P)
        tl.store(hidden + row * INNER + n, gate_N / (1.0 + tl.exp(-gate_N)) * up_N)


@triton.jit
def _down_few(
    hidden, words, scales, experts, shares, out,
    PER_TOKEN: tl.constexpr, ROUTED: tl.constexpr, FIRST: tl.constexpr, OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert_of(experts, row, PER_TOKEN, ROUTED, FIRST, True)
    if expert >= 0:
        own, own_scales = words + expert * STRIDE, scales + expert * (GROUPS * OUTPUTS)
        pairs = _load_pairs(own, own_scales, n, OUTPUTS, GROUPS, BLOCK_P)
        wait_for_inputs()
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
        y_N = _multiply(pairs, round_words(four, scale_PB), first_P, second_P) * tl.load(shares + row)
        tl.store(out + row * OUTPUTS + n, y_N.to(tl.bfloat16), mask=n < OUTPUTS)


def takes(weight: Tensor | Packed, x: Activation, most: int) -> TypeGuard[PackedSparse14]:
    """Whether these kernels multiply `x`, of up to `most` tokens, by `weight`."""
    return x.x_TD.shape[0] <= most and isinstance(weight, PackedSparse14) and weight.groups <= MOST_GROUPS


def _options(cut: Cut, weight: PackedSparse14) -> dict[str, int]:
    """Arguments of a launch."""
    block_p = triton.next_power_of_2(-(-weight.groups // 2))
    block_n = max(4, min(64, cut.rows // block_p))
    return {"GROUPS": weight.groups, "BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": cut.warps}


GATE_UP, DOWN = Cut(256, 4), Cut(512, 4)


def experts_few(
    x: Activation, gate_up: PackedSparse14, down: PackedSparse14, taken: Taken, weights_TK: Tensor
) -> Tensor:
    """As few.experts_few; `x` is `by_position`."""
    hidden_MI = launch_gate_up(_gate_up_few, x, gate_up, taken, _options(GATE_UP, gate_up))
    return launch_down(_down_few, hidden_MI, down, taken, weights_TK, _options(DOWN, down))
