"""Matrices in a number format, one or a stack of one shape: the operations of all formats.

Each format is a class: `Dense` here, `Fp8Weight`, `Int4Weight` and `Sparse14Weight` in their own modules;
quant/formats.py names the formats that users can select. The last axis of every tensor runs along the inputs,
and the others are those of the matrix, so most operations are the same for all formats.

Legend: O outputs (rows), I inputs, A stacked matrices, T tokens, M rows of several matrices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.quant.int8 import round_pieces

VALUES, POSITIONS, SCALES, DENSE = "values", "positions", "scales", "dense rest"


class Part(NamedTuple):
    """A tensor of a matrix: [..., O, ceil(I / inputs)], of a kind that reports name.

    inputs: of the matrix, per element. fill: the element for inputs with weight 0.
    """

    tensor: Tensor
    kind: str
    inputs: int
    fill: int = 0


class Matrix(ABC):
    """[O, I], or stacked [A, O, I]; `inputs` is I.

    takes_int8: whether activations may be rounded to int8 for products.
    """

    takes_int8: ClassVar[bool] = False

    if TYPE_CHECKING:  # a field of some classes: a property that they inherit would stand in its way

        @property
        def inputs(self) -> int:
            """I."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """Its tensors, the one with the values first."""

    @property
    def layout(self) -> tuple[object, ...]:
        """What compatible matrices have in common."""
        return type(self), *(part.inputs for part in self.parts)

    @property
    @abstractmethod
    def unit(self) -> int:
        """Inputs that cannot be split."""

    @abstractmethod
    def with_parts(self, tensors: Sequence[Tensor], inputs: int) -> Self:
        """A matrix of the same format with these tensors, in the order of `parts`."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[..., O, I] in new memory, as `dtype` (None: that of the format)."""

    @property
    def outputs(self) -> int:
        """O."""
        return self.parts[0].tensor.shape[-2]

    @property
    def count(self) -> int:
        """Matrices stacked, A."""
        return self.parts[0].tensor.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.tensor.nbytes for part in self.parts)

    @property
    def dense(self) -> Tensor | None:
        """The weights if they are plain numbers, not copied; None if they are packed."""
        return None

    def __getitem__(self, index: int) -> Self:
        """One of stacked matrices."""
        return self.map(lambda tensor: tensor[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Applies `change`, which moves whole rows, to every tensor: each has a row per output."""
        return self.with_parts([change(part.tensor) for part in self.parts], self.inputs)

    def split_inputs(self, count: int) -> list[Self]:
        """Splits the inputs into equal parts. Raises ValueError if a group would be split."""
        width = self.inputs // count
        if count > 1 and width % self.unit:
            raise ValueError(f"{count} parts of {width} inputs cut groups of {self.unit}")
        cut = zip(*(part.tensor.chunk(count, dim=-1) for part in self.parts), strict=True)
        return [self.with_parts(tensors, width) for tensors in cut]

    def pad_inputs(self, more: int) -> Self:
        """Appends `more` inputs of weight 0; groups of such inputs only have scale 0."""
        if more == 0:
            return self
        inputs = self.inputs + more

        def padded(part: Part) -> Tensor:
            missing = -(-inputs // part.inputs) - part.tensor.shape[-1]
            return functional.pad(part.tensor, (0, missing), value=part.fill)

        return self.with_parts([padded(part) for part in self.parts], inputs)

    def like(self, others: Sequence["Matrix"]) -> "Matrix":
        """The same matrix with the optional parts that `others` have, to make them compatible."""
        del others
        return self

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None = None, piece: int | None = None) -> Tensor:
        """x W^T + bias in plain torch, [T, O] in x's dtype: the reference of all kernels.

        It multiplies dequantized weights and activations in float32; kernels that sum integers differ only by
        float32 rounding. piece: inputs that share the scale of an int8 activation; None: activations are not
        rounded.
        """
        rounded = piece is not None and self.takes_int8
        y_TO = self._product(round_pieces(x_TI, piece) if rounded and piece else x_TI.float())
        return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)

    def _product(self, x_TI: Tensor) -> Tensor:
        """float32 [T, O] of float32 [T, I]."""
        return functional.linear(x_TI, self.dequantize(torch.float32))


@dataclass(frozen=True)
class Dense(Matrix):
    """Plain weights: float32 or bfloat16 [..., O, I]."""

    values: Tensor

    @property
    def inputs(self) -> int:
        """I."""
        return self.values.shape[-1]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The values."""
        return (Part(self.values, DENSE, 1),)

    @property
    def unit(self) -> int:
        """One input."""
        return 1

    @property
    def dense(self) -> Tensor | None:
        """The values."""
        return self.values

    def with_parts(self, tensors: Sequence[Tensor], inputs: int) -> "Dense":
        """See Matrix."""
        del inputs
        return Dense(*tensors)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A copy."""
        return self.values.to(dtype=dtype or self.values.dtype, copy=True)

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None = None, piece: int | None = None) -> Tensor:
        """x W^T + bias, computed in x's dtype."""
        del piece
        return functional.linear(x_TI, self.values, bias_O)


def join_rows(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix with the rows of all, which have equal inputs; dense if formats differ."""
    return _combine(matrices, _join)


def stack(matrices: Sequence[Matrix], rest: Callable[[], object] | None = None) -> Matrix:
    """Matrices of one shape with a leading axis; dense if formats differ. rest: called after each copy."""
    return _combine(matrices, _pile if rest is None else lambda tensors: _pile_slowly(tensors, rest))


def _combine(matrices: Sequence[Matrix], join: Callable[[list[Tensor]], Tensor]) -> Matrix:
    compatible = [matrix.like(matrices) for matrix in matrices]
    if len({matrix.layout for matrix in compatible}) > 1:
        dtype = next((matrix.dense.dtype for matrix in compatible if matrix.dense is not None), torch.float32)
        compatible = [Dense(matrix.dequantize(dtype)) for matrix in compatible]
    columns = zip(*([part.tensor for part in matrix.parts] for matrix in compatible), strict=True)
    return compatible[0].with_parts([join(list(tensors)) for tensors in columns], compatible[0].inputs)


def _join(rows: list[Tensor]) -> Tensor:
    """torch.cat; meta tensors are joined by hand, because torch imports its compiler for them, which takes
    seconds.
    """
    if rows[0].is_meta:
        return rows[0].new_empty(sum(part.shape[0] for part in rows), *rows[0].shape[1:])
    return torch.cat(rows)


def _pile(tensors: list[Tensor]) -> Tensor:
    """torch.stack, likewise."""
    if tensors[0].is_meta:
        return tensors[0].new_empty(len(tensors), *tensors[0].shape)
    return torch.stack(tensors)


def _pile_slowly(tensors: list[Tensor], rest: Callable[[], object]) -> Tensor:
    """torch.stack, one tensor at a time."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    piled = tensors[0].new_empty(len(tensors), *tensors[0].shape, dtype=dtype)
    for place, tensor in zip(piled, tensors, strict=True):
        place.copy_(tensor)
        rest()
    return piled
