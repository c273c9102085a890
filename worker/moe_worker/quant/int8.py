"""Eight-bit activations, rounded anew for each token.

Legend: T tokens, I inputs.
"""

import torch
from torch import Tensor


def quantize_tokens(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding (half to even) with one scale a token: int8 [T, I] and float32 scales [T].

    x is about q * scale; the scale makes the token's largest magnitude 127, and is 1 for a token of zeros.
    The scale of a token that is not finite is NaN or infinite, and so is what is computed from the token.
    """
    x_TI = x_TI.float()
    largest_T1 = x_TI.abs().amax(dim=-1, keepdim=True)
    scale_T1 = torch.where(largest_T1 == 0, torch.ones_like(largest_T1), largest_T1 / 127)
    return (x_TI / scale_T1).round_().clamp_(-127, 127).to(torch.int8), scale_T1.squeeze(-1)
