"""Packed weights as the kernels read them: int4, FP8, and 1:4 sparse int4.

Four-bit weights are stored [G, O, 64] bytes for G groups of 128 inputs: byte j of a row holds input j of the
group in its low and input 64 + j in its high nibble, both as signed values. A tile of any number of rows is
then one contiguous piece of memory, and its nibbles need no shuffling. FP8 weights are stored [O, I], as
checkpoints have them.

Legend: O outputs, I inputs, G groups of 128 inputs, P pairs of groups, Q quads of inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.quant.int8 import PIECE

# Quads of 64 inputs: those that a byte of values holds are so far apart.
QUADS = 16


class _Scaled:
    """What has a scale for each output and group of inputs, [..., G, O]."""

    scales: Tensor

    @property
    def outputs(self) -> int:
        """Rows of the matrix, O."""
        return self.scales.shape[-1]

    @property
    def groups(self) -> int:
        """Groups of inputs, G."""
        return self.scales.shape[-2]


@dataclass(frozen=True)
class PackedInt4(_Scaled):
    """Int4 weights as the kernels read them: uint8 [..., G, O, 64] and float32 scales [..., G, O].

    inputs: I, a multiple of 64. int8: whether activations are rounded to int8 (W4A8) or stay bf16 (W4A16).
    """

    packed: Tensor
    scales: Tensor
    inputs: int
    int8: bool = True

    @property
    def kind(self) -> str:
        """KIND of the kernels."""
        return "w4a8" if self.int8 else "w4a16"

    @property
    def stored(self) -> Tensor:
        """The bytes as the kernels take them, int8."""
        return self.packed.view(torch.int8)

    @property
    def stride(self) -> int:
        """Elements of `stored` from one stacked matrix to the next."""
        return self.groups * self.outputs * PIECE

    @property
    def row_stride(self) -> int:
        """Elements of `stored` from one output to the next, within a group."""
        return PIECE


@dataclass(frozen=True)
class PackedFp8(_Scaled):
    """FP8 weights as the kernels read them: e4m3 [..., O, I] and float32 scales [..., G, O].

    I is a multiple of 64. Activations stay bf16 (W8A16).
    """

    values: Tensor
    scales: Tensor
    kind = "fp8"
    int8 = False

    @property
    def inputs(self) -> int:
        """I."""
        return self.values.shape[-1]

    @property
    def stored(self) -> Tensor:
        """The values as the kernels take them."""
        return self.values

    @property
    def stride(self) -> int:
        """Elements of `stored` from one stacked matrix to the next."""
        return self.outputs * self.inputs

    @property
    def row_stride(self) -> int:
        """Elements of `stored` from one output to the next."""
        return self.inputs


@dataclass(frozen=True)
class PackedSparse14(_Scaled):
    """1:4 sparse int4 weights of experts as the kernels read them: uint8 [..., P, 3, O, 16] for P pairs of
    groups, and float32 scales [..., G, O]; activations are rounded to int8 (W4A8).

    The rows of bytes are the values of the first and of the second group of a pair, and the positions of
    both. Byte q of values holds that of quad q of the group in its low and of quad 16 + q in its high nibble,
    as signed values; byte q of positions those of quads q, 16 + q, and q and 16 + q of the second group, the
    first in its highest bits. inputs: I, a multiple of 128.
    """

    packed: Tensor
    scales: Tensor
    inputs: int
    int8 = True
    kind = "s14"

    @property
    def stored(self) -> Tensor:
        """The bytes as the kernels take them, int8."""
        return self.packed.view(torch.int8)

    @property
    def stride(self) -> int:
        """Elements of `stored` from one stacked matrix to the next."""
        return -(-self.groups // 2) * 3 * self.outputs * QUADS

    @property
    def row_stride(self) -> int:
        """Elements of `stored` from one output to the next, within a row of bytes of a pair."""
        return QUADS


Packed = PackedInt4 | PackedFp8 | PackedSparse14


def pack_values(values: Tensor, scales: Tensor, inputs: int, int8: bool = True) -> PackedInt4:
    """Packs values -8..7 [..., G, O, 128] that have their scales [..., G, O] already.

    Raises ValueError where `inputs` are not a multiple of 64.
    """
    if inputs % PIECE:
        raise ValueError(f"{inputs} inputs are not a multiple of {PIECE}")
    low, high = (values & 15).to(torch.uint8).split(PIECE, dim=-1)
    return PackedInt4((low | high << 4).contiguous(), scales.float().contiguous(), inputs, int8)


def pack_sparse14(values: Tensor, positions: Tensor, scales: Tensor) -> PackedSparse14:
    """Packs values -8..7 and positions 0..3 [..., O, Q] of Q quads, which make whole groups of 128 inputs.

    scales: [..., O, G]. Raises ValueError where groups are not whole.
    """
    quads = values.shape[-1]
    if quads % (2 * QUADS):
        raise ValueError(f"{quads} quads are no whole groups of {2 * QUADS}")
    missing = -quads % (4 * QUADS)
    # [..., O, P, group of the pair, half of the group, quad]
    cut = [
        functional.pad(each, (0, missing)).unflatten(-1, (-1, 2, 2, QUADS)) for each in (values, positions)
    ]
    low, high = (cut[0] & 15).to(torch.uint8).unbind(-2)
    shifts = torch.tensor([[6, 4], [2, 0]], dtype=torch.uint8, device=values.device)
    places = (cut[1].to(torch.uint8) << shifts[..., None]).sum((-3, -2), dtype=torch.uint8)
    packed = torch.cat((low | high << 4, places.unsqueeze(-2)), dim=-2).movedim(-4, -2)
    return PackedSparse14(packed.contiguous(), scales.transpose(-1, -2).float().contiguous(), 4 * quads)
