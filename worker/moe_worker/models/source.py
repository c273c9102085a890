"""Where a model's tensors come from."""

from typing import Protocol

import torch
from torch import Tensor


class TensorSource(Protocol):
    """Gives tensors by name, on one device and in one dtype."""

    device: torch.device
    dtype: torch.dtype

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Tensor `name`, which must have `shape`, in `dtype` (None: the source's own)."""
        ...
