"""Matrices in whatever format: joined, reordered, split and stacked.

Legend: O outputs (rows), I inputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_worker.quant.int4 import Int4Weight
from moe_worker.quant.sparse14 import QUAD, Sparse14Weight

Matrix = Tensor | Int4Weight | Sparse14Weight


def join_rows(parts: Sequence[Matrix]) -> Matrix:
    """One matrix with the rows of all, which have the same inputs; dense if any of them is."""
    return _combine(parts, torch.cat)


def map_rows(matrix: Matrix, change: Callable[[Tensor], Tensor]) -> Matrix:
    """`change` moves whole rows of a tensor; it is applied to everything that has a row for each output."""
    if isinstance(matrix, Tensor):
        return change(matrix)
    if isinstance(matrix, Sparse14Weight):
        return matrix.map(change)
    zeros = None if matrix.zeros_OG is None else change(matrix.zeros_OG)
    return Int4Weight(change(matrix.packed_OP), change(matrix.scales_OG), zeros, matrix.inputs, matrix.group)


def split_inputs(matrix: Matrix, parts: int) -> list[Matrix]:
    """Cuts the inputs into equal parts. Raises ValueError where a group would be cut."""
    if isinstance(matrix, Tensor):
        return list(matrix.chunk(parts, dim=-1))
    width = matrix.inputs // parts
    if parts > 1 and width % matrix.group:
        raise ValueError(f"{parts} parts of {width} inputs cut groups of {matrix.group}")
    if isinstance(matrix, Sparse14Weight):
        return _split_sparse(matrix, parts, width)
    packed, scales = matrix.packed_OP.chunk(parts, dim=-1), matrix.scales_OG.chunk(parts, dim=-1)
    zeros = [None] * parts if matrix.zeros_OG is None else list(matrix.zeros_OG.chunk(parts, dim=-1))
    return [Int4Weight(p, s, z, width, matrix.group) for p, s, z in zip(packed, scales, zeros, strict=True)]


def stack(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of one shape with a leading axis; dense if any of them is."""
    return _combine(parts, torch.stack)


def _split_sparse(matrix: Sparse14Weight, parts: int, width: int) -> list[Matrix]:
    """Cuts bytes of four quads: inputs a part must be a multiple of 16."""
    if parts > 1 and width % (4 * QUAD):
        raise ValueError(f"{parts} parts of {width} inputs cut bytes of {4 * QUAD}")
    pieces = [
        tensor.chunk(parts, dim=-1) for tensor in (matrix.values_OP, matrix.positions_OR, matrix.scales_OG)
    ]
    return [Sparse14Weight(v, p, s, width, matrix.group) for v, p, s in zip(*pieces, strict=True)]


def _combine(parts: Sequence[Matrix], join: Callable[[list[Tensor]], Tensor]) -> Matrix:
    sparse = [part for part in parts if isinstance(part, Sparse14Weight)]
    if len(sparse) == len(parts):
        return Sparse14Weight(
            join([part.values_OP for part in sparse]),
            join([part.positions_OR for part in sparse]),
            join([part.scales_OG for part in sparse]),
            sparse[0].inputs,
            sparse[0].group,
        )
    dense = [part for part in parts if isinstance(part, Tensor)]
    packed = [part for part in parts if isinstance(part, Int4Weight)]
    if dense or sparse:  # formats that differ
        dtype = dense[0].dtype if dense else torch.float32
        return join([part if isinstance(part, Tensor) else part.dequantize(dtype) for part in parts])
    zeros = None
    if any(part.zeros_OG is not None for part in packed):
        zeros = join([_zeros(part) for part in packed])
    return Int4Weight(
        join([part.packed_OP for part in packed]),
        join([part.scales_OG for part in packed]),
        zeros,
        packed[0].inputs,
        packed[0].group,
    )


def _zeros(part: Int4Weight) -> Tensor:
    if part.zeros_OG is not None:
        return part.zeros_OG
    return torch.zeros_like(part.scales_OG, dtype=torch.int8)
