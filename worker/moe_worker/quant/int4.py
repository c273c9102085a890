"""Four-bit weights in groups of inputs that share a scale, and a zero point where they are asymmetric.

Legend: O outputs, I inputs, P = ceil(I / 2) bytes of two values, G = ceil(I / group) groups; leading axes
(experts) are allowed everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.quant.pieces import float_rows

GROUP = 128
LOWEST, HIGHEST = -8, 7
# Shares of the largest weight of a group that may become the edge of the range; the one with the smallest
# squared error is taken. A single outlier then does not coarsen its 127 neighbours.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Int4Weight:
    """A matrix: weight[o, i] = scale[o, i // group] * (value[o, i] - zero[o, i // group]).

    packed_OP: uint8, value + 8 in four bits, that of the even input in the low ones. scales_OG: floating.
    zeros_OG: int8 from -8 to 7, or None where all are 0. inputs: I, where odd the last high bits mean
    nothing.
    """

    packed_OP: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None
    inputs: int
    group: int = GROUP

    @property
    def outputs(self) -> int:
        """O."""
        return self.packed_OP.shape[-2]

    @property
    def count(self) -> int:
        """Matrices stacked, A."""
        return self.packed_OP.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zero points."""
        return sum(t.nbytes for t in (self.packed_OP, self.scales_OG, self.zeros_OG) if t is not None)

    def __getitem__(self, index: int) -> "Int4Weight":
        """One of stacked matrices."""
        return self.map(lambda tensor: tensor[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Int4Weight":
        """`change`, which must treat all rows the same way, applied to values, scales and zero points."""
        zeros = None if self.zeros_OG is None else change(self.zeros_OG)
        return Int4Weight(change(self.packed_OP), change(self.scales_OG), zeros, self.inputs, self.group)

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
    """Rounds [..., O, I] to the nearest of 15 symmetric values a group, the range chosen among CLIPS."""
    inputs, leading = weight.shape[-1], weight.shape[:-1]
    parts = [_round_rows(piece, group, scale_dtype) for piece in float_rows(weight.reshape(-1, inputs))]
    packed, scales = (torch.cat(tensors).unflatten(0, leading) for tensors in zip(*parts, strict=True))
    return Int4Weight(packed, scales, None, inputs, group)


def _round_rows(weight_OI: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed values [O, P] and scales [O, G]."""
    inputs = weight_OI.shape[-1]
    padded = functional.pad(weight_OI, (0, -inputs % group))
    grouped = padded.unflatten(-1, (-1, group))
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    best, error = None, None
    for clip in CLIPS:
        scale = _scale(largest * clip, scale_dtype)
        rounded = (grouped / scale).round_().clamp_(-HIGHEST, HIGHEST)
        squared = (rounded * scale - grouped).square_().sum(dim=-1, keepdim=True)
        if best is None or error is None:
            best, error = scale, squared
        else:
            better = squared < error
            best, error = torch.where(better, scale, best), torch.where(better, squared, error)
    if best is None:
        raise ValueError("CLIPS is empty")
    values = (grouped / best).round_().clamp_(-HIGHEST, HIGHEST).to(torch.int8).flatten(-2)
    return pack(values[..., :inputs]), best.squeeze(-1).to(scale_dtype)


def _scale(edge: Tensor, dtype: torch.dtype) -> Tensor:
    """What makes HIGHEST the edge, rounded as it will be stored; 1 for groups of zeros."""
    scale = (edge / HIGHEST).to(dtype).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))
