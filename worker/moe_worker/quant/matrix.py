"""Matrices in whatever format: joined, reordered, split and stacked.

Legend: O outputs (rows), I inputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_worker.quant.fp8 import Fp8Weight
from moe_worker.quant.int4 import Int4Weight
from moe_worker.quant.sparse14 import QUAD, Sparse14Weight

Packed = Int4Weight | Sparse14Weight | Fp8Weight
Matrix = Tensor | Packed


def join_rows(parts: Sequence[Matrix]) -> Matrix:
    """One matrix with the rows of all, which have the same inputs; dense if any of them is."""
    return _combine(parts, _join)


def map_rows(matrix: Matrix, change: Callable[[Tensor], Tensor]) -> Matrix:
    """`change` moves whole rows of a tensor; it is applied to everything that has a row for each output."""
    return change(matrix) if isinstance(matrix, Tensor) else matrix.map(change)


def split_inputs(matrix: Matrix, parts: int) -> list[Matrix]:
    """Cuts the inputs into equal parts. Raises ValueError where a group would be cut."""
    if isinstance(matrix, Tensor):
        return list(matrix.chunk(parts, dim=-1))
    width = matrix.inputs // parts
    group = matrix.columns if isinstance(matrix, Fp8Weight) else matrix.group
    if parts > 1 and width % group:
        raise ValueError(f"{parts} parts of {width} inputs cut groups of {group}")
    if isinstance(matrix, Sparse14Weight):
        return _split_sparse(matrix, parts, width)
    if isinstance(matrix, Fp8Weight):
        pieces = matrix.bits_OI.chunk(parts, dim=-1), matrix.scales_OC.chunk(parts, dim=-1)
        return [Fp8Weight(bits, scales, group) for bits, scales in zip(*pieces, strict=True)]
    packed, scales = matrix.packed_OP.chunk(parts, dim=-1), matrix.scales_OG.chunk(parts, dim=-1)
    zeros = [None] * parts if matrix.zeros_OG is None else list(matrix.zeros_OG.chunk(parts, dim=-1))
    return [Int4Weight(p, s, z, width, group) for p, s, z in zip(packed, scales, zeros, strict=True)]


def stack(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of one shape with a leading axis; dense if any of them is."""
    return _combine(parts, _pile)


def _join(rows: list[Tensor]) -> Tensor:
    """torch.cat. Those without data are joined by hand: torch imports its compiler for them, for seconds."""
    if rows[0].is_meta:
        return rows[0].new_empty(sum(part.shape[0] for part in rows), *rows[0].shape[1:])
    return torch.cat(rows)


def _pile(tensors: list[Tensor]) -> Tensor:
    """torch.stack, likewise."""
    if tensors[0].is_meta:
        return tensors[0].new_empty(len(tensors), *tensors[0].shape)
    return torch.stack(tensors)


def _split_sparse(matrix: Sparse14Weight, parts: int, width: int) -> list[Matrix]:
    """Cuts bytes of four quads: inputs a part must be a multiple of 16."""
    if parts > 1 and width % (4 * QUAD):
        raise ValueError(f"{parts} parts of {width} inputs cut bytes of {4 * QUAD}")
    pieces = [
        tensor.chunk(parts, dim=-1) for tensor in (matrix.values_OP, matrix.positions_OR, matrix.scales_OG)
    ]
    return [Sparse14Weight(v, p, s, width, matrix.group) for v, p, s in zip(*pieces, strict=True)]


def _combine(parts: Sequence[Matrix], join: Callable[[list[Tensor]], Tensor]) -> Matrix:
    kinds = {type(part) for part in parts}
    groups = {part.group for part in parts if isinstance(part, Sparse14Weight | Int4Weight)}
    if kinds == {Sparse14Weight, Int4Weight} and len(groups) == 1:
        parts = [part.to_int4() if isinstance(part, Sparse14Weight) else part for part in parts]
    elif len(kinds) > 1:
        return _combine_dense(parts, join)
    sparse = [part for part in parts if isinstance(part, Sparse14Weight)]
    if sparse:
        return Sparse14Weight(
            join([part.values_OP for part in sparse]),
            join([part.positions_OR for part in sparse]),
            join([part.scales_OG for part in sparse]),
            sparse[0].inputs,
            sparse[0].group,
        )
    eight = [part for part in parts if isinstance(part, Fp8Weight)]
    if eight:
        bits, scales = join([part.bits_OI for part in eight]), join([part.scales_OC for part in eight])
        return Fp8Weight(bits, scales, eight[0].columns)
    packed = [part for part in parts if isinstance(part, Int4Weight)]
    return _combine_int4(packed, join) if packed else _combine_dense(parts, join)


def _combine_dense(parts: Sequence[Matrix], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """In the dtype of those that are dense already."""
    dtype = next((part.dtype for part in parts if isinstance(part, Tensor)), torch.float32)
    return join([part if isinstance(part, Tensor) else part.dequantize(dtype) for part in parts])


def _combine_int4(parts: Sequence[Int4Weight], join: Callable[[list[Tensor]], Tensor]) -> Int4Weight:
    zeros = None
    if any(part.zeros_OG is not None for part in parts):
        zeros = join([_zeros(part) for part in parts])
    return Int4Weight(
        join([part.packed_OP for part in parts]),
        join([part.scales_OG for part in parts]),
        zeros,
        parts[0].inputs,
        parts[0].group,
    )


def _zeros(part: Int4Weight) -> Tensor:
    if part.zeros_OG is not None:
        return part.zeros_OG
    return torch.zeros_like(part.scales_OG, dtype=torch.int8)
