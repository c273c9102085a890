"""1:4 sparse int4 weights for large passes: dense int4 ones with explicit zeros, which is exact.

Small passes, which are bound by the bytes of the weights, multiply by the sparse ones (`products.dot_group`).

Legend: O outputs, G groups of 128 inputs, P pairs of groups, Q = 16 quads.
"""

import torch
import triton
import triton.language as tl

from moe_worker.kernels.triton.packed import PackedInt4, PackedSparse14
from moe_worker.quant.int8 import PIECE


@triton.jit
def _to_int4(packed, words, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_O: tl.constexpr):
    matrix, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    q = tl.arange(0, 16)
    mask_O = (o < OUTPUTS)[:, None]
    PAIRS: tl.constexpr = (GROUPS + 1) // 2
    pair_OQ = packed + ((matrix * PAIRS + group // 2) * 3 * OUTPUTS + o)[:, None] * 16 + q[None, :]
    value_OQ = tl.load(pair_OQ + group % 2 * (OUTPUTS * 16), mask=mask_O, other=0).to(tl.int32)
    place_OQ = tl.load(pair_OQ + 2 * OUTPUTS * 16, mask=mask_O, other=0).to(tl.int32) >> (1 - group % 2) * 4
    # Words of four inputs: of the first half of the group in low nibbles, of the second in high ones.
    low_OQ = (value_OQ & 15) << ((place_OQ >> 2 & 3) * 8)
    high_OQ = (value_OQ & 240) << ((place_OQ & 3) * 8)
    to_OQ = words + ((matrix * GROUPS + group) * OUTPUTS + o)[:, None] * 16 + q[None, :]
    tl.store(to_OQ, low_OQ | high_OQ, mask=mask_O)


def to_int4(weight: PackedSparse14) -> PackedInt4:
    """The same matrices with explicit zeros."""
    leading, device = weight.scales.shape[:-2], weight.scales.device
    out = torch.empty(*leading, weight.groups, weight.outputs, PIECE, dtype=torch.uint8, device=device)
    block_o = 64
    _to_int4[(leading.numel() * weight.groups, triton.cdiv(weight.outputs, block_o))](
        weight.stored, out.view(torch.int32), OUTPUTS=weight.outputs, GROUPS=weight.groups, BLOCK_O=block_o,
        num_warps=4,
    )  # fmt: skip
    return PackedInt4(out, weight.scales, weight.inputs)
