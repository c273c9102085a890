"""Projections: a matrix in some format, and how it is multiplied, in plain torch.

Legend: T tokens, I inputs, O outputs, A experts, M rows of all experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.reference import grouped_linear
from moe_worker.quant.fp8 import Fp8Weight
from moe_worker.quant.int4 import Int4Weight
from moe_worker.quant.int8 import piece_of, round_pieces
from moe_worker.quant.matrix import Matrix, Packed
from moe_worker.quant.sparse14 import QUAD, Sparse14Weight


class Linear(Protocol):
    """y = x W^T + bias."""

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O], in x's dtype."""
        ...


@dataclass(frozen=True)
class DenseLinear:
    """Weights as they are computed with: float32 or bfloat16."""

    weight_OI: Tensor
    bias_O: Tensor | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        return functional.linear(x_TI, self.weight_OI, self.bias_O)


@dataclass(frozen=True)
class Int4Linear:
    """W4A16 (`piece` None: activations as they are) or W4A8: the reference of both.

    It multiplies in float32 what weights and activations stand for. Kernels that sum integers differ from it
    only in the roundings of float32. piece: inputs that share the scale of an int8 activation.
    """

    weight: Int4Weight
    bias_O: Tensor | None = None
    piece: int | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        return int4_linear(x_TI, self.weight, self.piece, self.bias_O)


def int4_linear(x_TI: Tensor, weight: Int4Weight, piece: int | None, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias for one matrix, in x's dtype."""
    y_TO = functional.linear(_activations(x_TI, piece), weight.dequantize(torch.float32))
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


def _activations(x_TI: Tensor, piece: int | None) -> Tensor:
    return x_TI.float() if piece is None else round_pieces(x_TI, piece)


@dataclass(frozen=True)
class Sparse14Linear:
    """1:4 sparse int4 weights, activations as they are or rounded to int8: the reference of both.

    A quarter of the dense matrix is the most that is ever written out.
    """

    weight: Sparse14Weight
    bias_O: Tensor | None = None
    piece: int | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        return sparse14_linear(x_TI, self.weight, self.piece, self.bias_O)


def sparse14_linear(
    x_TI: Tensor, weight: Sparse14Weight, piece: int | None, bias_O: Tensor | None = None
) -> Tensor:
    """x W^T + bias for one matrix, in x's dtype: one product for each of the four positions."""
    scaled_OQ, positions_OQ = weight.scaled(), weight.positions()
    x_TQ4 = _activations(x_TI, piece).unflatten(-1, (-1, QUAD))
    y_TO = x_TI.new_zeros(x_TI.shape[0], weight.outputs, dtype=torch.float32)
    for position in range(QUAD):
        y_TO += x_TQ4[..., position] @ (scaled_OQ * (positions_OQ == position)).T
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


@dataclass(frozen=True)
class Fp8Linear:
    """FP8 weights with a scale for each block, activations as they are (W8A16): the reference.

    It multiplies in float32 what the weights stand for, exactly as a dense matrix of float32 would.
    """

    weight: Fp8Weight
    bias_O: Tensor | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        return fp8_linear(x_TI, self.weight, self.bias_O)


def fp8_linear(x_TI: Tensor, weight: Fp8Weight, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias for one matrix, in x's dtype."""
    bias_O = None if bias_O is None else bias_O.float()
    return functional.linear(x_TI.float(), weight.dequantize(), bias_O).to(x_TI.dtype)


def make_linear(matrix: Matrix, bias_O: Tensor | None = None, piece: int | None = None) -> Linear:
    """The projection by `matrix`; piece: of int8 activations, None where they stay as they are."""
    if isinstance(matrix, Int4Weight):
        return Int4Linear(matrix, bias_O, piece)
    if isinstance(matrix, Sparse14Weight):
        return Sparse14Linear(matrix, bias_O, piece)
    if isinstance(matrix, Fp8Weight):
        return Fp8Linear(matrix, bias_O)
    return DenseLinear(matrix, bias_O)


def grouped_matrix(x_MI: Tensor, weights_AOI: Matrix, ends_A: Tensor, round_tokens: bool) -> Tensor:
    """Multiplies rows ends[a - 1] to ends[a] of x by stacked matrix a, transposed; [M, O]."""
    if isinstance(weights_AOI, Tensor):
        return grouped_linear(x_MI, weights_AOI, ends_A)
    out_MO = x_MI.new_empty(x_MI.shape[0], weights_AOI.outputs)
    piece = piece_of(x_MI.shape[1]) if round_tokens else None
    start = 0
    for index, end in enumerate(ends_A.tolist()):
        if end > start:
            out_MO[start:end] = _multiply(x_MI[start:end], weights_AOI[index], piece)
        start = end
    return out_MO


def _multiply(x_TI: Tensor, weight: Packed, piece: int | None) -> Tensor:
    if isinstance(weight, Fp8Weight):
        return fp8_linear(x_TI, weight)
    if isinstance(weight, Sparse14Weight):
        return sparse14_linear(x_TI, weight, piece)
    return int4_linear(x_TI, weight, piece)
