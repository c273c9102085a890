"""Projections: a matrix in some format, and how it is multiplied.

Legend: T tokens, I inputs, O outputs.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional


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
