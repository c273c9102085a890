"""Products of activations with one packed matrix: W4A8, W4A16 or FP8.

Legend: T tokens, O outputs, G groups of 128 inputs.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.launch import wait_for_inputs
from moe_worker.kernels.triton.norm import Activation
from moe_worker.kernels.triton.packed import Packed
from moe_worker.kernels.triton.products import Tile, add_product
from moe_worker.quant.int4 import GROUP


@triton.jit(do_not_specialize=["tokens"])
def _linear_packed(
    x, x_scale, packed, scales, out, tokens,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, PIECE: tl.constexpr,
    KIND: tl.constexpr, TURN: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(2)
    OWN: tl.constexpr = GROUPS // PARTS
    if PARTS > 1:
        packed += part * OWN * (128 if KIND == "fp8" else OUTPUTS * 64)
        scales += part * OWN * OUTPUTS
        x += part * OWN * 128
        x_scale += part * OWN * (128 // PIECE)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_N = tl.minimum(n, OUTPUTS - 1)
    token_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_M = token_M < tokens
    wait_for_inputs()
    acc_NM = add_product(
        tl.zeros((BLOCK_N, BLOCK_M), tl.float32), packed, scales, x, x_scale, rows_N,
        tl.minimum(token_M, tokens - 1), mask_M,
        OUTPUTS, OWN, INPUTS, PIECE, KIND, TURN, STAGES,
    )  # fmt: skip
    where = out + (token_M[None, :].to(tl.int64) * PARTS + part) * OUTPUTS + n[:, None]
    tl.store(where, acc_NM.to(out.dtype.element_ty), mask=mask_M[None, :] & (n < OUTPUTS)[:, None])


def linear_tile(tokens: int, outputs: int, kind: str = "w4a8") -> Tile:
    """How the product of `tokens` rows with a matrix of `outputs` and `kind` is cut."""
    head = outputs > 32768
    if tokens <= 64:
        if head:
            return Tile(64, 16, 4, 3) if tokens <= 16 else Tile(128, 32 if tokens <= 32 else 64, 4, 3)
        return Tile(32, 16, 2, 3, 4) if tokens <= 16 else Tile(64, 32, 4, 3, 4 if kind == "w4a8" else 2)
    if kind == "w4a8":
        return Tile(128, 64, 4, 3) if head or tokens > 256 else Tile(128, 32, 4, 3, 2)
    return Tile(64, 128, 4, 3) if head or tokens > 512 else Tile(64, 64, 4, 3)


# Parts that a product is cut into along its inputs, so that an H200's multiprocessors all have a program.
PARTS = 2


def linear_parts(tokens: int, weight: Packed) -> int:
    """Parts of a product whose reader sums rows anyway."""
    whole = weight.inputs % GROUP == 0 and weight.groups % PARTS == 0
    return PARTS if tokens <= 512 and whole else 1


def linear_packed(x: Activation, weight: Packed, out_TO: Tensor, parts: int = 1) -> None:
    """Writes x W^T to `out_TO` (any floating dtype): sums of each group of inputs, scaled in float32.

    parts: rows of `out_TO` [T * parts, O] for each token, each of some groups; their sum is the product.
    """
    tokens = x.x_TD.shape[0]
    tile = linear_tile(tokens, weight.outputs, weight.kind)
    grid = (triton.cdiv(weight.outputs, tile.n), triton.cdiv(tokens, tile.m), parts)
    _linear_packed[grid](
        x.q_TD if weight.int8 else x.x_TD, x.scales_TX, weight.stored, weight.scales, out_TO, tokens,
        OUTPUTS=weight.outputs, GROUPS=weight.groups, INPUTS=weight.inputs, PIECE=x.piece,
        KIND=weight.kind, TURN=min(tile.turn, weight.groups // parts), STAGES=tile.stages, PARTS=parts,
        BLOCK_N=tile.n, BLOCK_M=tile.m, **tile.options,
    )  # fmt: skip
