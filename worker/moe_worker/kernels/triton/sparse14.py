"""Products with 1:4 sparse int4 weights (the layout s14): each quad of inputs has one value and its position.

A program holds a tile of values and positions, and makes four dense tiles of them in registers, one for each
position, three quarters zero; memory is read once and sparse. Tensor cores then do the work of the dense
product, which decoding, bound by memory, does not feel. Written for its traffic; tested in Triton's
interpreter, not yet timed on a GPU.

Legend: T tokens, I inputs, O outputs, J = 32 quads of a piece of 128 inputs, N and M tiles of outputs and
tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.quant.int8 import piece_of, quantize_pieces
from moe_worker.quant.sparse14 import QUAD, Sparse14Weight

TURN = 128  # inputs that one turn of the loop multiplies: 32 quads, the least that int8 tensor cores take


@triton.jit
def _linear_sparse14(
    x, x_scale, values, positions, scales, out, tokens,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    QUADS: tl.constexpr = INPUTS // 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_N, mask_M = n < OUTPUTS, m < tokens
    row_N = tl.minimum(n, OUTPUTS - 1).to(tl.int64)
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, QUADS, 32):
        quad_J = first + tl.arange(0, 32)
        there_J = quad_J < QUADS
        byte_NJ = tl.load(
            values + row_N[:, None] * ((QUADS + 1) // 2) + (quad_J // 2)[None, :],
            mask=there_J[None, :],
            other=0,
        )
        value_NJ = ((byte_NJ.to(tl.int32) >> ((quad_J % 2) * 4)[None, :]) & 15) - 8
        value_NJ = tl.where(there_J[None, :], value_NJ, 0)
        place_NJ = tl.load(
            positions + row_N[:, None] * ((QUADS + 3) // 4) + (quad_J // 4)[None, :],
            mask=there_J[None, :],
            other=0,
        )
        place_NJ = (place_NJ.to(tl.int32) >> ((quad_J % 4) * 2)[None, :]) & 3
        scale_N = tl.load(scales + row_N * ((INPUTS + GROUP - 1) // GROUP) + first * 4 // GROUP)
        # Where pieces are half an iteration, each half is multiplied with the other masked.
        for half in tl.static_range(128 // PIECE):
            piece = first * 4 // PIECE + half
            mine_J = there_J & (quad_J * 4 // PIECE == piece)
            dots_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
            for position in tl.static_range(4):
                x_JM = tl.load(
                    x + m[None, :].to(tl.int64) * INPUTS + (quad_J * 4 + position)[:, None],
                    mask=mine_J[:, None] & mask_M[None, :],
                    other=0,
                )
                weight_NJ = tl.where(place_NJ == position, value_NJ, 0).to(tl.int8)
                dots_NM = tl.dot(weight_NJ, x_JM, acc=dots_NM, out_dtype=tl.int32)
            x_scale_M = tl.load(
                x_scale + m * ((INPUTS + PIECE - 1) // PIECE) + piece,
                mask=mask_M & (piece * PIECE < INPUTS),
                other=0.0,
            )
            acc_NM += dots_NM.to(tl.float32) * (scale_N.to(tl.float32)[:, None] * x_scale_M[None, :])
    where = out + m[None, :].to(tl.int64) * OUTPUTS + n[:, None]
    tl.store(where, acc_NM.to(out.dtype.element_ty), mask=mask_N[:, None] & mask_M[None, :])


def linear_sparse14(x_TI: Tensor, weight: Sparse14Weight) -> Tensor:
    """[T, O] in x's dtype; activations are rounded to int8 with one scale a piece.

    The group must be a multiple of 128 or the whole row.
    """
    if weight.group % TURN and weight.group < weight.inputs:
        raise ValueError(f"groups of {weight.group} cut pieces of {TURN} inputs")
    if weight.inputs % QUAD:
        raise ValueError(f"{weight.inputs} inputs are not a multiple of four")
    piece = piece_of(weight.inputs)
    values_TI, scales_TX = quantize_pieces(x_TI, piece)
    tokens, outputs = x_TI.shape[0], weight.outputs
    out_TO = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    block_n, block_m = 64, 16 if tokens <= 16 else 32
    _linear_sparse14[(triton.cdiv(outputs, block_n), triton.cdiv(tokens, block_m))](
        values_TI.contiguous(), scales_TX, weight.values_OP, weight.positions_OR, weight.scales_OG, out_TO,
        tokens, OUTPUTS=outputs, INPUTS=weight.inputs, GROUP=weight.group, PIECE=piece,
        BLOCK_N=block_n, BLOCK_M=block_m, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out_TO
