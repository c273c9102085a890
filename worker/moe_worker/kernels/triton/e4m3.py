"""Steps of many tokens on the FP8 tensor cores: weights and activations become e4m3, the library multiplies.

The library's products take one float32 scale for each row of either operand. A row of int4 weights gets
1/32 of the largest scale of its groups, so that the weights of that group are exact in e4m3, and those of
other groups are off by at most 1/16 of themselves. A token's activations are rounded once for all experts.

Legend: T tokens, K experts a token, M = T * K rows sorted by expert, D hidden, I intermediate, F = 2 * I, A
experts, O outputs, G groups of 128 inputs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType

from moe_worker.kernels.triton.norm import Activation, Added
from moe_worker.kernels.triton.packed import PackedInt4, PackedSparse14
from moe_worker.kernels.triton.sparse14 import to_int4
from moe_worker.kernels.triton.tiles import e4m3_scale, to_e4m3
from moe_worker.kernels.triton.wide import Weight, group_rows
from moe_worker.quant.fp8 import E4M3

# The compute capability for which the products were tried.
CAPABILITY = (9, 0)


def lacking(device: torch.device) -> str | None:
    """Why `device` has no products of e4m3 rows, in words; None where it has."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "this is no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        return f"products in FP8 were tried on compute capability 9.0 only; this is {found[0]}.{found[1]}"
    return None


class ScaledRows(NamedTuple):
    """e4m3 [..., R, C] and float32 scales [..., R], one for each row."""

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, *sizes: int, device: torch.device) -> "ScaledRows":
        """Memory for [..., R, C]."""
        return cls(
            torch.empty(*sizes, dtype=E4M3, device=device),
            torch.empty(*sizes[:-1], dtype=torch.float32, device=device),
        )


@triton.jit
def _widen_rows(packed, scales, out, out_scale, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
                INPUTS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_O: tl.constexpr):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    g, j = tl.arange(0, BLOCK_G), tl.arange(0, 64)
    MASKED: tl.constexpr = OUTPUTS % BLOCK_O != 0 or INPUTS % 128 != 0
    mask_o = (o < OUTPUTS) if MASKED else None
    mask_O = (o < OUTPUTS)[:, None] if MASKED else None
    own = scales + matrix * GROUPS * OUTPUTS + o
    mask_Go = (g < GROUPS)[:, None] & (o < OUTPUTS)[None, :]
    top_o = tl.max(tl.abs(tl.load(own[None, :] + g[:, None] * OUTPUTS, mask=mask_Go, other=0.0)), axis=0)
    top_o = tl.where(top_o == 0.0, 1.0, top_o)
    tl.store(out_scale + matrix * OUTPUTS + o, top_o * 0.03125, mask=mask_o)
    for group in tl.range(GROUPS, num_stages=3):
        row_o = (matrix * GROUPS + group) * OUTPUTS + o
        pair = tl.load(packed + row_o[:, None] * 64 + j[None, :], mask=mask_O).to(tl.int32)
        scale_o = tl.load(own + group * OUTPUTS, mask=mask_o) / top_o * 32.0
        low = (((pair & 15) ^ 8) - 8).to(tl.float32) * scale_o[:, None]
        high = (((pair >> 4 & 15) ^ 8) - 8).to(tl.float32) * scale_o[:, None]
        to = out + (matrix * OUTPUTS + o)[:, None] * INPUTS + group * 128 + j[None, :]
        tl.store(to, to_e4m3(low), mask=mask_O)
        inside = (o < OUTPUTS)[:, None] & (group * 128 + 64 + j < INPUTS)[None, :] if MASKED else None
        tl.store(to + 64, to_e4m3(high), mask=inside)


def widen_rows(weight: PackedInt4) -> ScaledRows:
    """The matrix (or matrices) in e4m3, [..., O, I]."""
    leading, device = weight.scales.shape[:-2], weight.scales.device
    out = ScaledRows.empty(*leading, weight.outputs, weight.inputs, device=device)
    block_o = 16
    _widen_rows[(leading.numel(), triton.cdiv(weight.outputs, block_o))](
        weight.stored, weight.scales, out.values, out.scales, OUTPUTS=weight.outputs, GROUPS=weight.groups,
        INPUTS=weight.inputs, BLOCK_G=triton.next_power_of_2(weight.groups), BLOCK_O=block_o, num_warps=2,
    )  # fmt: skip
    return out


def linear_e4m3(x: Activation, weight: Weight) -> Tensor:
    """x W^T in bf16, of the e4m3 side of `x`."""
    values_OI, scales_O = widen_rows(_int4(weight))
    return functional.scaled_mm(
        x.q_TD, values_OI.t(), x.scales_TX, ScalingType.RowWise, scales_O[None, :], ScalingType.RowWise,
        output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["total"])
def _gather(words, scales, order, out, out_scale, total, PER_TOKEN: tl.constexpr, WORDS: tl.constexpr,
            BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    r, i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    mask_r = r < total
    mask = mask_r[:, None] & (i < WORDS)[None, :]
    token_r = tl.load(order + r, mask=mask_r, other=0) // PER_TOKEN
    tl.store(out_scale + r, tl.load(scales + token_r, mask=mask_r, other=0.0), mask=mask_r)
    word_rI = tl.load(words + token_r[:, None] * WORDS + i[None, :], mask=mask, other=0)
    tl.store(out + r.to(tl.int64)[:, None] * WORDS + i[None, :], word_rI, mask=mask)


def gather(x: Activation, order_M: Tensor, per_token: int) -> ScaledRows:
    """The e4m3 side of the token of each row."""
    width, total, block_r = x.x_TD.shape[1], order_M.shape[0], 4
    out = ScaledRows.empty(total, width, device=order_M.device)
    words = width // 4
    _gather[(triton.cdiv(total, block_r),)](
        x.q_TD.view(torch.int32), x.scales_TX, order_M, out.values.view(torch.int32), out.scales, total,
        PER_TOKEN=per_token, WORDS=words, BLOCK=triton.next_power_of_2(words), BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _hidden_rows(gate_up, shares, order, out, out_scale, INNER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < INNER
    gate = tl.load(gate_up + row * (2 * INNER) + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * INNER) + INNER + i, mask=mask, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    scale = e4m3_scale(hidden, 0)
    tl.store(out + row * INNER + i, to_e4m3(hidden / scale), mask=mask)
    tl.store(out_scale + row, scale * tl.load(shares + tl.load(order + row)))


def hidden_rows(gate_up_MF: Tensor, weights_TK: Tensor, order_M: Tensor) -> ScaledRows:
    """SwiGLU of each row; the weight of its expert is part of its scale."""
    total, inner = gate_up_MF.shape[0], gate_up_MF.shape[1] // 2
    out = ScaledRows.empty(total, inner, device=gate_up_MF.device)
    _hidden_rows[(total,)](
        gate_up_MF, weights_TK, order_M, out.values, out.scales, INNER=inner,
        BLOCK=triton.next_power_of_2(inner), num_warps=1,
    )  # fmt: skip
    return out


def grouped(x: ScaledRows, weight: ScaledRows, ends_A: Tensor) -> Tensor:
    """x W^T in bf16 [M, O]; rows up to each of `ends_A` meet the matrix of one expert."""
    out_MO: Tensor = functional.scaled_grouped_mm(  # type: ignore[attr-defined]
        x.values, weight.values.transpose(1, 2), x.scales, ScalingType.RowWise, weight.scales,
        ScalingType.RowWise, offs=ends_A, output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return out_MO


def experts_e4m3(
    x: Activation, gate_up: Weight, down: Weight, experts_TK: Tensor, weights_TK: Tensor, counts_A: Tensor
) -> Added:
    """Weighted outputs of all experts of all tokens, in the order of the experts.

    x has its e4m3 side. counts_A: int32 histogram of `experts_TK`.
    """
    rows = group_rows(experts_TK, counts_A)
    read = gather(x, rows.order_M, experts_TK.shape[1])
    gate_up_MF = grouped(read, widen_rows(_int4(gate_up)), rows.ends_A)
    hidden = hidden_rows(gate_up_MF, weights_TK, rows.order_M)
    return rows.added(grouped(hidden, widen_rows(_int4(down)), rows.ends_A))


def _int4(weight: Weight) -> PackedInt4:
    if isinstance(weight, PackedSparse14):
        return to_int4(weight)
    if not isinstance(weight, PackedInt4):
        raise TypeError(f"{type(weight).__name__} are not multiplied in e4m3")
    return weight
