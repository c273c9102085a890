"""Projections: a matrix in some format, a bias, and how activations are rounded; in plain torch.

Legend: T tokens, I inputs, O outputs, A experts, M rows of all experts.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_worker.kernels.reference import grouped_linear
from moe_worker.quant.int8 import piece_of
from moe_worker.quant.matrix import Matrix


@dataclass(frozen=True)
class Linear:
    """y = x W^T + bias. piece: inputs that share the scale of an int8 activation; None: none are rounded."""

    matrix: Matrix
    bias_O: Tensor | None = None
    piece: int | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O], in x's dtype."""
        return self.matrix.multiply(x_TI, self.bias_O, self.piece)


def grouped_matrix(x_MI: Tensor, weights_AOI: Matrix, ends_A: Tensor, round_tokens: bool) -> Tensor:
    """Multiplies rows ends[a - 1] to ends[a] of x by stacked matrix a, transposed; [M, O]."""
    if weights_AOI.dense is not None:
        return grouped_linear(x_MI, weights_AOI.dense, ends_A)
    out_MO = x_MI.new_empty(x_MI.shape[0], weights_AOI.outputs)
    piece = piece_of(x_MI.shape[1]) if round_tokens else None
    start = 0
    for index, end in enumerate(ends_A.tolist()):
        if end > start:
            out_MO[start:end] = weights_AOI[index].multiply(x_MI[start:end], piece=piece)
        start = end
    return out_MO
