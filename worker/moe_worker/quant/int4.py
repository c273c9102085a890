"""Four-bit weights in groups of inputs with a common scale and, if asymmetric, a zero point.

Legend: O outputs, I inputs, P = ceil(I / 2) bytes of two values, G = ceil(I / group) groups; leading axes
(experts) are allowed everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.quant.matrix import SCALES, VALUES, Matrix, Part
from moe_worker.quant.pieces import float_rows

GROUP = 128
HIGHEST = 7
ZERO_BYTE = 0x88  # two values of 0
# Shares of the largest weight of a group that may become the edge of the range; the one with the smallest
# squared error is taken. A single outlier then does not coarsen its 127 neighbours.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Int4Weight(Matrix):
    """A matrix: weight[o, i] = scale[o, i // group] * (value[o, i] - zero[o, i // group]).

    packed_OP: uint8, value + 8 in four bits, the even input in the low bits. scales_OG: floating. zeros_OG:
    int8 from -8 to 7, or None if all are 0. inputs: I; if it is odd, the last high bits are unused.
    """

    takes_int8 = True

    packed_OP: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None
    inputs: int
    group: int = GROUP

    @property
    def parts(self) -> tuple[Part, ...]:
        """Values, scales and, where there are any, zero points."""
        scaled = (Part(self.packed_OP, VALUES, 2, ZERO_BYTE), Part(self.scales_OG, SCALES, self.group))
        return scaled if self.zeros_OG is None else (*scaled, Part(self.zeros_OG, SCALES, self.group))

    @property
    def unit(self) -> int:
        """A group."""
        return self.group

    def with_parts(self, tensors: Sequence[Tensor], inputs: int) -> "Int4Weight":
        """See Matrix."""
        packed, scales, *zeros = tensors
        return Int4Weight(packed, scales, zeros[0] if zeros else None, inputs, self.group)

    def like(self, others: Sequence[Matrix]) -> "Int4Weight":
        """With zero points of 0 if others have zero points."""
        asymmetric = any(isinstance(each, Int4Weight) and each.zeros_OG is not None for each in others)
        if self.zeros_OG is not None or not asymmetric:
            return self
        zeros = torch.zeros_like(self.scales_OG, dtype=torch.int8)
        return Int4Weight(self.packed_OP, self.scales_OG, zeros, self.inputs, self.group)

    def values(self) -> Tensor:
        """int8 [..., O, I], from -8 to 7."""
        return unpack(self.packed_OP, self.inputs)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[..., O, I], computed in the dtype of the scales, as `dtype` (None: that of the scales)."""
        value = self.values().to(self.scales_OG.dtype)
        if self.zeros_OG is not None:
            value = value - self._spread(self.zeros_OG.to(self.scales_OG.dtype))
        return (value * self._spread(self.scales_OG)).to(dtype or self.scales_OG.dtype)

    def _spread(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.group, dim=-1)[..., : self.inputs]


def pack(values: Tensor) -> Tensor:
    """int8 [..., O, I] from -8 to 7 as uint8 [..., O, P]."""
    shifted = (values + 8).to(torch.uint8)
    if shifted.shape[-1] % 2:
        shifted = functional.pad(shifted, (0, 1))
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpack(packed: Tensor, inputs: int) -> Tensor:
    """The inverse of `pack`: int8 [..., O, inputs]."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.flatten(-2)[..., :inputs].to(torch.int8) - 8


def quantize_int4(weight: Tensor, group: int = GROUP, scale_dtype: torch.dtype = torch.float32) -> Int4Weight:
    """Rounds [..., O, I] to the nearest of 15 symmetric values per group: the only rounding rule of int4."""
    inputs, leading = weight.shape[-1], weight.shape[:-1]
    parts = [_round_rows(piece, group, scale_dtype) for piece in float_rows(weight.reshape(-1, inputs))]
    packed, scales = (torch.cat(tensors).unflatten(0, leading) for tensors in zip(*parts, strict=True))
    return Int4Weight(packed, scales, None, inputs, group)


def _round_rows(weight_OI: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed values [O, P] and scales [O, G]."""
    scales_OG = search_scales(weight_OI, group, scale_dtype)
    return pack(round_values(weight_OI, scales_OG, group)), scales_OG.to(scale_dtype)


def search_scales(weight: Tensor, group: int, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales float32 [..., O, G], rounded to `scale_dtype`: the one of CLIPS with the least squared error."""
    grouped = cut_groups(weight, group)
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    best = torch.ones_like(largest)
    least = torch.full_like(largest, float("inf"))
    for clip in CLIPS:
        scale = _scale(largest * clip, scale_dtype)
        rounded = (grouped / scale).round_().clamp_(-HIGHEST, HIGHEST)
        error = (rounded * scale - grouped).square_().sum(dim=-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(least, error)
    return best.squeeze(-1)


def round_values(weight: Tensor, scales_OG: Tensor, group: int) -> Tensor:
    """int8 [..., O, I] from -HIGHEST to HIGHEST: the nearest to each weight, half to even."""
    values = (cut_groups(weight, group) / scales_OG.unsqueeze(-1)).round_().clamp_(-HIGHEST, HIGHEST)
    return values.to(torch.int8).flatten(-2)[..., : weight.shape[-1]]


def cut_groups(weight: Tensor, group: int) -> Tensor:
    """float32 [..., O, G, group], padded by zeros."""
    padded = functional.pad(weight.float(), (0, -weight.shape[-1] % group))
    grouped: Tensor = padded.unflatten(-1, (-1, group))
    return grouped


def _scale(edge: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that maps the edge to HIGHEST, rounded as it is stored; 1 for groups of zeros."""
    scale = (edge / HIGHEST).to(dtype).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))
