"""Pieces that several kernels share: int4 tiles, rounding to int8, and the layout of packed weights.

Packed weights are stored [G, O, 64] bytes for G groups of 128 inputs: byte j of a row holds input j of the
group in its low and input 64 + j in its high nibble, both as signed values. A tile of any number of rows is
then one contiguous piece of memory, and two dot products over 64 inputs need no shuffling of nibbles.

Legend: O outputs, I inputs, G groups of 128 inputs, A experts, T tokens, X pieces of 64 inputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Weights share a scale over 128 inputs, activations over 64.
GROUP = 128
PIECE = 64
# Interpreted kernels (TRITON_INTERPRET=1) can neither run assembly nor multiply bf16.
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class PackedInt4:
    """Int4 weights as the kernels read them: uint8 [..., G, O, 64] and float32 scales [..., G, O].

    inputs: I, a multiple of 64. int8: whether activations are rounded to int8 (W4A8) or stay bf16 (W4A16).
    """

    packed: Tensor
    scales: Tensor
    inputs: int
    int8: bool = True

    @property
    def outputs(self) -> int:
        """Rows of the matrix, O."""
        return self.scales.shape[-1]

    @property
    def groups(self) -> int:
        """Groups of inputs, G."""
        return self.scales.shape[-2]

    @property
    def pieces(self) -> int:
        """Pieces of 64 inputs; one less than 2 G where the last group is half empty."""
        return self.inputs // PIECE

    @property
    def signed(self) -> Tensor:
        """The bytes as the kernels take them, int8."""
        return self.packed.view(torch.int8)


def round_to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values -8..7 (int8) [..., G, O, 128] and scales [..., G, O] of weights [..., O, I], padded by 0."""
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[-1] % GROUP))
    grouped = padded.unflatten(-1, (-1, GROUP)).transpose(-2, -3)
    scales = grouped.abs().amax(-1).clamp_min(1e-8) / 7
    return (grouped / scales.unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8), scales


def pack_int4(weight: Tensor, int8: bool = True) -> PackedInt4:
    """Rounds [..., O, I] to nearest, symmetric, one scale for 128 inputs, and packs it for the kernels."""
    values, scales = round_to_int4(weight)
    return pack_values(values, scales, weight.shape[-1], int8)


def pack_values(values: Tensor, scales: Tensor, inputs: int, int8: bool = True) -> PackedInt4:
    """Packs values -8..7 [..., G, O, 128] that have their scales [..., G, O] already.

    Raises ValueError where `inputs` are not a multiple of 64.
    """
    if inputs % PIECE:
        raise ValueError(f"{inputs} inputs are not a multiple of {PIECE}")
    low, high = (values & 15).to(torch.uint8).split(PIECE, dim=-1)
    return PackedInt4((low | high << 4).contiguous(), scales.float().contiguous(), inputs, int8)


class Tile(NamedTuple):
    """How a product is cut: outputs and rows of one program, its warps, and loads under way.

    The choices for each product were measured by benchmarks/gpu_tiles.py on Hopper GPUs.
    """

    n: int
    m: int
    warps: int
    stages: int


@triton.jit
def unpack_low(packed):
    """Low nibbles of int8 values, as signed int8 times 16."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return (packed << 4).to(tl.int8)


@triton.jit
def unpack_high(packed):
    """High nibbles of int8 values, as signed int8 times 16."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return (packed & -16).to(tl.int8)


@triton.jit
def round_even(x):
    """Rounds float32 values below 2**22 to whole numbers, halves to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def dot_bf16(a_MK, b_KN, acc):
    """acc + a b in float32; acc may be 0.0."""
    if COMPILED:
        if isinstance(acc, tl.constexpr):
            return tl.dot(a_MK, b_KN)
        return tl.dot(a_MK, b_KN, acc=acc)
    return acc + tl.dot(a_MK.to(tl.float32), b_KN.to(tl.float32))


@triton.jit
def dot_int4_group(
    acc_NM, packed_base, scale_base, x_base, x_scale_base, group, rows_N, token_M, mask_M,
    OUTPUTS: tl.constexpr, PIECES: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Adds the products of one group of 128 inputs; x has PIECES * 64 columns, of int8 or bf16.

    Weights stand as the left operand, so that few tokens still fill the tensor cores' wide side.
    """
    j = tl.arange(0, 64)
    packed = tl.load(packed_base + (group * OUTPUTS + rows_N)[:, None] * 64 + j[None, :])
    # Nibbles are unpacked as 16 times their value.
    scale_N = tl.load(scale_base + group * OUTPUTS + rows_N) * 0.0625
    mask_high_M = mask_M
    if PIECES % 2 == 1:
        mask_high_M = mask_M & (group * 2 + 1 < PIECES)
    x_row = x_base + token_M[None, :] * (PIECES * 64) + group * 128 + j[:, None]
    low_jM = tl.load(x_row, mask=mask_M[None, :], other=0)
    high_jM = tl.load(x_row + 64, mask=mask_high_M[None, :], other=0)
    low_Nj, high_Nj = unpack_low(packed), unpack_high(packed)
    if INT8:
        s_low_M = tl.load(x_scale_base + token_M * PIECES + group * 2, mask=mask_M, other=0.0)
        s_high_M = tl.load(x_scale_base + token_M * PIECES + group * 2 + 1, mask=mask_high_M, other=0.0)
        low = tl.dot(low_Nj, low_jM, out_dtype=tl.int32)
        high = tl.dot(high_Nj, high_jM, out_dtype=tl.int32)
        sums = low.to(tl.float32) * s_low_M[None, :] + high.to(tl.float32) * s_high_M[None, :]
    else:
        sums = dot_bf16(low_Nj.to(tl.float32).to(tl.bfloat16), low_jM, 0.0)
        sums = dot_bf16(high_Nj.to(tl.float32).to(tl.bfloat16), high_jM, sums)
    return acc_NM + sums * scale_N[:, None]


@triton.jit
def store_int8_NM(
    values_NM, q_base, scale_base, row_M, first, mask_M, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Rounds [ROWS, M] (ROWS a multiple of 64) to int8 in pieces of 64 and stores them at row_M."""
    PIECES: tl.constexpr = ROWS // 64
    TOKENS: tl.constexpr = values_NM.shape[1]
    cut_PjM = tl.reshape(values_NM, (PIECES, 64, TOKENS))
    top_PM = tl.max(tl.abs(cut_PjM), axis=1)
    scale_PM = tl.where(top_PM > 0.0, top_PM / 127.0, 1.0)
    q_PjM = round_even(cut_PjM / scale_PM[:, None, :]).to(tl.int8)
    n = first + tl.arange(0, ROWS)
    p = first // 64 + tl.arange(0, PIECES)
    tl.store(
        q_base + row_M[None, :] * WIDTH + n[:, None], tl.reshape(q_PjM, (ROWS, TOKENS)), mask=mask_M[None, :]
    )
    tl.store(scale_base + row_M[None, :] * (WIDTH // 64) + p[:, None], scale_PM, mask=mask_M[None, :])
