"""The layout s14: one of four consecutive inputs has a weight, stored as four bits and a two-bit position.

A *quad* is four consecutive inputs. docs/formats.md defines every bit of a checkpoint.

Legend: O outputs, I inputs, Q = I / 4 quads, P = ceil(Q / 2) bytes of values, R = ceil(Q / 4) bytes of
positions, G groups of inputs that share a scale; leading axes (experts) are allowed everywhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.quant.int4 import GROUP, ZERO_BYTE, Int4Weight, pack, unpack
from moe_worker.quant.matrix import POSITIONS as OF_POSITIONS
from moe_worker.quant.matrix import SCALES as OF_SCALES
from moe_worker.quant.matrix import VALUES as OF_VALUES
from moe_worker.quant.matrix import Matrix, Part

VALUES, POSITIONS, SCALE = "weight_s14_values", "weight_s14_positions", "weight_scale"
QUAD = 4


@dataclass(frozen=True)
class Sparse14Weight(Matrix):
    """A matrix: weight[o, 4 q + position[o, q]] = scale[o, 4 q // group] * value[o, q], all others are 0.

    values_OP: uint8, value + 8 in four bits, that of the even quad in the low ones. positions_OR: uint8, two
    bits a quad, the first of four in the lowest. scales_OG: floating. inputs: I, a multiple of 4; group: too.
    """

    takes_int8 = True

    values_OP: Tensor
    positions_OR: Tensor
    scales_OG: Tensor
    inputs: int
    group: int = GROUP

    @property
    def parts(self) -> tuple[Part, ...]:
        """Values, positions and scales."""
        return (
            Part(self.values_OP, OF_VALUES, 2 * QUAD, ZERO_BYTE),
            Part(self.positions_OR, OF_POSITIONS, 4 * QUAD),
            Part(self.scales_OG, OF_SCALES, self.group),
        )

    @property
    def unit(self) -> int:
        """Whole groups, and whole bytes of four quads."""
        return math.lcm(self.group, 4 * QUAD)

    def with_parts(self, tensors: Sequence[Tensor], inputs: int) -> "Sparse14Weight":
        """See Matrix."""
        values, positions, scales = tensors
        return Sparse14Weight(values, positions, scales, inputs, self.group)

    def like(self, others: Sequence[Matrix]) -> Matrix:
        """As int4 with explicit zeros, which is exact, if others are int4 and not sparse."""
        dense = [other for other in others if isinstance(other, Int4Weight)]
        return self.to_int4() if dense and all(other.group == self.group for other in dense) else self

    def values(self) -> Tensor:
        """int8 [..., O, Q], from -8 to 7."""
        return unpack(self.values_OP, self.inputs // QUAD)

    def positions(self) -> Tensor:
        """uint8 [..., O, Q], from 0 to 3."""
        return unpack_positions(self.positions_OR, self.inputs // QUAD)

    def scaled(self) -> Tensor:
        """float32 [..., O, Q]: the stored weights, dequantized."""
        scales_OQ = self.scales_OG.float().repeat_interleave(self.group // QUAD, dim=-1)
        return self.values().float() * scales_OQ[..., : self.inputs // QUAD]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[..., O, I] with explicit zeros, in `dtype` (None: that of the scales)."""
        return self._spread(self.scaled()).to(dtype or self.scales_OG.dtype)

    def to_int4(self) -> Int4Weight:
        """As int4 with explicit zeros."""
        return Int4Weight(pack(self._spread(self.values())), self.scales_OG, None, self.inputs, self.group)

    def _product(self, x_TI: Tensor) -> Tensor:
        """One product for each position, so that at most a quarter of the dense matrix is materialized."""
        scaled_OQ, positions_OQ = self.scaled(), self.positions()
        x_TQ4 = x_TI.unflatten(-1, (-1, QUAD))
        y_TO = x_TI.new_zeros(x_TI.shape[0], self.outputs)
        for position in range(QUAD):
            y_TO += x_TQ4[..., position] @ (scaled_OQ * (positions_OQ == position)).T
        return y_TO

    def _spread(self, kept_OQ: Tensor) -> Tensor:
        """[..., O, I]: the value of each quad at its position."""
        dense = kept_OQ.new_zeros(*kept_OQ.shape, QUAD)
        dense.scatter_(-1, self.positions().long().unsqueeze(-1), kept_OQ.unsqueeze(-1))
        return dense.flatten(-2)


def pack_positions(positions: Tensor) -> Tensor:
    """uint8 [..., Q] from 0 to 3 as uint8 [..., ceil(Q / 4)]."""
    padded = functional.pad(positions, (0, -positions.shape[-1] % 4))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=positions.device)
    packed: Tensor = (padded.unflatten(-1, (-1, 4)) << shifts).sum(dim=-1).to(torch.uint8)
    return packed


def unpack_positions(packed: Tensor, quads: int) -> Tensor:
    """The inverse of `pack_positions`: uint8 [..., quads]."""
    fours = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    positions: Tensor = fours.flatten(-2)[..., :quads]
    return positions


def from_int4(weight: Int4Weight) -> Sparse14Weight:
    """The same matrix without its zeros.

    Raises ValueError where a quad has more than one weight, where inputs or groups are no multiple of 4, or
    where zero points are not 0.
    """
    if weight.inputs % QUAD or weight.group % QUAD or weight.zeros_OG is not None:
        raise ValueError("s14 needs inputs and groups of multiples of 4, and symmetric weights")
    values_OQ4 = weight.values().unflatten(-1, (-1, QUAD))
    if bool(((values_OQ4 != 0).sum(dim=-1) > 1).any()):
        raise ValueError("a quad has more than one weight that is not 0; prune to 1 of 4 first")
    positions_OQ = values_OQ4.ne(0).to(torch.uint8).argmax(dim=-1).to(torch.uint8)
    values_OQ = values_OQ4.sum(dim=-1).to(torch.int8)
    packed = pack(values_OQ)
    if values_OQ.shape[-1] % 2:
        packed[..., -1] = packed[..., -1] & 0x0F | ZERO_BYTE & 0xF0
    return Sparse14Weight(packed, pack_positions(positions_OQ), weight.scales_OG, weight.inputs, weight.group)


def to_tensors(weight: Sparse14Weight) -> dict[str, Tensor]:
    """The tensors of one matrix by the last part of their names."""
    return {VALUES: weight.values_OP, POSITIONS: weight.positions_OR, SCALE: weight.scales_OG}


def from_tensors(tensors: Mapping[str, Tensor], inputs: int, group: int) -> Sparse14Weight:
    """The inverse of `to_tensors`; shapes must have been checked."""
    return Sparse14Weight(tensors[VALUES], tensors[POSITIONS], tensors[SCALE], inputs, group)


def shapes(outputs: int, inputs: int, group: int) -> dict[str, tuple[int, int]]:
    """The shape of each tensor of a matrix."""
    quads = inputs // QUAD
    return {
        VALUES: (outputs, -(-quads // 2)),
        POSITIONS: (outputs, -(-quads // 4)),
        SCALE: (outputs, -(-inputs // group)),
    }


def quantization_config(group: int) -> dict[str, Any]:
    """The entry of config.json for such a checkpoint."""
    return {"quant_method": "moe-operator", "format": "s14-int4", "group_size": group, "version": 1}
