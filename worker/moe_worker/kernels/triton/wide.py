"""Steps of many tokens: weights are dequantized to bf16 in each layer, and library products do the rest.

With thousands of tokens arithmetic is what costs, and a product in bf16 from cuBLAS or CUTLASS then beats one
that scales the sums of every 128 inputs.

Legend: T tokens, K experts a token, M = T * K rows sorted by expert, D hidden, I intermediate, F = 2 * I, A
experts, O outputs, G groups of 128 inputs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.triton.norm import Added
from moe_worker.kernels.triton.packed import Packed, PackedFp8, PackedSparse14
from moe_worker.kernels.triton.sparse14 import to_int4
from moe_worker.kernels.triton.tiles import int8_scale, round_even
from moe_worker.quant.int8 import piece_of

Weight = Tensor | Packed


@triton.jit
def _widen(packed, scales, out, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr,
           BLOCK_O: tl.constexpr):  # fmt: skip
    matrix, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    j = tl.arange(0, 64)
    MASKED: tl.constexpr = OUTPUTS % BLOCK_O != 0 or INPUTS % 128 != 0
    mask_O = (o < OUTPUTS)[:, None] if MASKED else None
    row_o = (matrix * GROUPS + group) * OUTPUTS + o
    pair = tl.load(packed + row_o[:, None] * 64 + j[None, :], mask=mask_O).to(tl.int32)
    scale_o = tl.load(scales + row_o, mask=(o < OUTPUTS) if MASKED else None)
    low = ((pair & 15) ^ 8) - 8
    high = ((pair >> 4 & 15) ^ 8) - 8
    to = out + (matrix * OUTPUTS + o)[:, None] * INPUTS + group * 128 + j[None, :]
    tl.store(to, (low.to(tl.float32) * scale_o[:, None]).to(tl.bfloat16), mask=mask_O)
    inside = (o < OUTPUTS)[:, None] & (group * 128 + 64 + j < INPUTS)[None, :] if MASKED else None
    tl.store(to + 64, (high.to(tl.float32) * scale_o[:, None]).to(tl.bfloat16), mask=inside)


@triton.jit
def _widen_fp8(values, scales, out, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr,
               BLOCK_O: tl.constexpr):  # fmt: skip
    matrix, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = group * 128 + tl.arange(0, 128)
    MASKED: tl.constexpr = OUTPUTS % BLOCK_O != 0 or INPUTS % 128 != 0
    mask_Ok = (o < OUTPUTS)[:, None] & (k < INPUTS)[None, :] if MASKED else None
    at_Ok = (matrix * OUTPUTS + o)[:, None] * INPUTS + k[None, :]
    scale_O = tl.load(
        scales + (matrix * GROUPS + group) * OUTPUTS + o, mask=(o < OUTPUTS) if MASKED else None
    )
    value_Ok = tl.load(values + at_Ok, mask=mask_Ok).to(tl.float32)
    tl.store(out + at_Ok, (value_Ok * scale_O[:, None]).to(tl.bfloat16), mask=mask_Ok)


def widen(weight: Weight) -> Tensor:
    """The matrix (or matrices) in bf16, [..., O, I]; a dense one as it is."""
    if isinstance(weight, Tensor):
        return weight
    if isinstance(weight, PackedSparse14):
        weight = to_int4(weight)
    leading = weight.scales.shape[:-2]
    out = torch.empty(
        *leading, weight.outputs, weight.inputs, dtype=torch.bfloat16, device=weight.scales.device
    )
    matrices = out.numel() // (weight.outputs * weight.inputs)
    kernel, block_o = (_widen_fp8, 64) if isinstance(weight, PackedFp8) else (_widen, 16)
    kernel[(matrices * weight.groups, triton.cdiv(weight.outputs, block_o))](
        weight.stored, weight.scales, out, OUTPUTS=weight.outputs, GROUPS=weight.groups, INPUTS=weight.inputs,
        BLOCK_O=block_o,
    )  # fmt: skip
    return out


@triton.jit
def _hidden(gate_up, shares, order, out, INNER: tl.constexpr, EMULATED: tl.constexpr, PIECE: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < INNER
    gate = tl.load(gate_up + row * (2 * INNER) + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * INNER) + INNER + i, mask=mask, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    if EMULATED:
        cut = tl.reshape(hidden, (BLOCK // PIECE, PIECE))
        scale = int8_scale(cut, 1)
        hidden = tl.reshape(round_even(cut / scale[:, None]) * scale[:, None], (BLOCK,))
    share = tl.load(shares + tl.load(order + row))
    tl.store(out + row * INNER + i, (hidden * share).to(tl.bfloat16), mask=mask)


class Grouped(NamedTuple):
    """Rows of all tokens' experts, sorted by expert: the number t * K + k of each, int64 [M], the ends of the
    experts' rows, int32 [A], and the expert of each number, int32 [M].
    """

    order_M: Tensor
    ends_A: Tensor
    keys_M: Tensor

    def added(self, out_MD: Tensor) -> Added:
        """The sum of each token's rows of `out_MD`."""
        numbers_M = torch.arange(self.order_M.shape[0], device=self.order_M.device)
        places_M = torch.empty_like(self.order_M).index_copy_(0, self.order_M, numbers_M)
        return Added(out_MD, places_M, self.keys_M)


def group_rows(experts_TK: Tensor, counts_A: Tensor) -> Grouped:
    """Rows of no expert (-1) go behind all others, where no product reads them or writes their outputs.

    counts_A: int32 histogram of `experts_TK`.
    """
    keys_M = experts_TK.flatten()
    order_M = torch.where(keys_M < 0, counts_A.shape[0], keys_M).argsort(stable=True)
    return Grouped(order_M, counts_A.cumsum(0, dtype=torch.int32), keys_M)


def experts_wide(
    x_TD: Tensor, gate_up_AFD: Tensor, down_ADI: Tensor, experts_TK: Tensor, weights_TK: Tensor,
    counts_A: Tensor, emulated: bool,
) -> Added:  # fmt: skip
    """Weighted outputs of all experts of all tokens, in the order of the experts.

    counts_A: int32 histogram of `experts_TK`. emulated: hidden values are rounded as int8 kernels round them.
    """
    per_token, inner = experts_TK.shape[1], down_ADI.shape[2]
    rows = group_rows(experts_TK, counts_A)
    rows_MD = x_TD.index_select(0, rows.order_M // per_token)
    gate_up_MF = functional.grouped_mm(rows_MD, gate_up_AFD.transpose(1, 2), offs=rows.ends_A)
    hidden_MI = torch.empty(rows_MD.shape[0], inner, dtype=torch.bfloat16, device=x_TD.device)
    block = 512
    _hidden[(rows_MD.shape[0], triton.cdiv(inner, block))](
        gate_up_MF, weights_TK, rows.order_M, hidden_MI, INNER=inner, EMULATED=emulated,
        PIECE=piece_of(inner), BLOCK=block, num_warps=2,
    )  # fmt: skip
    return rows.added(functional.grouped_mm(hidden_MI, down_ADI.transpose(1, 2), offs=rows.ends_A))
