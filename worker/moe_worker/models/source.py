"""Source of a model's tensors."""

from typing import Protocol

import torch
from torch import Tensor

from moe_worker.quant.int8 import piece_of
from moe_worker.quant.matrix import Matrix


class TensorSource(Protocol):
    """Provides tensors by name, on one device and in one dtype.

    round_tokens: whether the model rounds activations to int8 before int4 weights.
    """

    device: torch.device
    dtype: torch.dtype
    round_tokens: bool

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Tensor `name`, which must have `shape`, in `dtype` (None: the source's own)."""
        ...

    def matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        """The weights of a projection, [outputs, inputs], in the format of the model."""
        ...


def piece_for(source: TensorSource, width: int) -> int | None:
    """Inputs that share the scale of an int8 activation of `width`; None if activations are not rounded."""
    return piece_of(width) if source.round_tokens else None
