"""FP8 weights (e4m3) with a scale for each block, as DeepSeek publishes them (arXiv:2412.19437, 3.3).

Legend: O outputs, I inputs, R = ceil(O / rows of a block), C = ceil(I / columns of a block); leading axes
(experts) are allowed where a class says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.quant.matrix import SCALES, VALUES, Matrix, Part
from moe_worker.quant.pieces import float_rows

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8Weight(Matrix):
    """A matrix (or stacked ones): weight[o, i] = value[o, i] * scale[o, i // columns].

    bits_OI: uint8 [..., O, I], the bits of e4m3, because torch moves e4m3 with few operations only.
    scales_OC: float32 [..., O, C]. Each row stores the scales of its block, so rows can be joined and
    reordered across blocks; for 128 columns that takes 3 % more memory than one scale a block.
    """

    bits_OI: Tensor
    scales_OC: Tensor
    columns: int

    @property
    def inputs(self) -> int:
        """I."""
        return self.bits_OI.shape[-1]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Values and scales."""
        return Part(self.bits_OI, VALUES, 1), Part(self.scales_OC, SCALES, self.columns)

    @property
    def unit(self) -> int:
        """Inputs of a block."""
        return self.columns

    def with_parts(self, tensors: Sequence[Tensor], inputs: int) -> "Fp8Weight":
        """See Matrix."""
        del inputs
        bits, scales = tensors
        return Fp8Weight(bits, scales, self.columns)

    def values(self) -> Tensor:
        """e4m3 [..., O, I], the same memory."""
        return self.bits_OI.view(E4M3)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[..., O, I], computed in float32, as `dtype` (None: float32)."""
        scales_OI = self.scales_OC.repeat_interleave(self.columns, dim=-1)[..., : self.inputs]
        return (self.values().float() * scales_OI).to(dtype or torch.float32)


def from_blocks(weight_OI: Tensor, scales_RC: Tensor, block: tuple[int, int]) -> Fp8Weight:
    """Unchanged e4m3 weights [O, I] with a scale for each block of `block` rows and columns."""
    rows, columns = block
    scales_OC = scales_RC.float().repeat_interleave(rows, dim=0)[: weight_OI.shape[0]]
    return Fp8Weight(weight_OI.view(torch.uint8), scales_OC, columns)


def quantize_fp8(weight_OI: Tensor) -> Fp8Weight:
    """Rounds to nearest, half to even; the largest of each block of 128 x 128 becomes 448."""
    parts = [_round_blocks(piece) for piece in float_rows(weight_OI, BLOCK[0])]
    bits, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Fp8Weight(bits, scales, BLOCK[1])


def _round_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The bits [O, I] and the scales of each row [O, C]."""
    outputs, inputs = weight_OI.shape
    padded = functional.pad(weight_OI, (0, -inputs % BLOCK[1], 0, -outputs % BLOCK[0]))
    blocks_RrCc = padded.unflatten(1, (-1, BLOCK[1])).unflatten(0, (-1, BLOCK[0]))
    scales_R1C1 = blocks_RrCc.abs().amax(dim=(1, 3), keepdim=True) / LARGEST
    scales_R1C1 = torch.where(scales_R1C1 > 0, scales_R1C1, torch.ones_like(scales_R1C1))
    values = (blocks_RrCc / scales_R1C1).to(E4M3).view(torch.uint8).flatten(2).flatten(0, 1)
    scales_OC = scales_R1C1[:, 0, :, 0].repeat_interleave(BLOCK[0], dim=0)
    return values[:outputs, :inputs], scales_OC[:outputs]
