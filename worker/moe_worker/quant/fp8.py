"""FP8 weights (e4m3) with a scale for each block, as DeepSeek publishes them (arXiv:2412.19437, 3.3).

Legend: O outputs, I inputs, R = ceil(O / rows of a block), C = ceil(I / columns of a block).
"""

import torch
from torch import Tensor


def dequantize_fp8(
    weight_OI: Tensor, scales_RC: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """weight * scale of its block, computed in float32, as `dtype`."""
    rows, columns = weight_OI.shape
    scales_OC = scales_RC.float().repeat_interleave(block[0], dim=0)[:rows]
    scales_OI = scales_OC.repeat_interleave(block[1], dim=1)[:, :columns]
    return (weight_OI.float() * scales_OI).to(dtype)
