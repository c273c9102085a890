"""Rounds large matrices a few rows at a time, so that float32 copies stay small.

Legend: O outputs, I inputs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Weights of a piece: what the caches of a CPU hold, and enough to keep a GPU busy.
CPU_PIECE, GPU_PIECE = 1 << 18, 1 << 24


def float_rows(weight_OI: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """Consecutive float32 pieces of whole rows; all but the last have a `multiple` of rows."""
    most = CPU_PIECE if weight_OI.device.type == "cpu" else GPU_PIECE
    rows = max(1, most // (multiple * weight_OI.shape[1])) * multiple
    return (part.to(torch.float32) for part in weight_OI.split(rows))
