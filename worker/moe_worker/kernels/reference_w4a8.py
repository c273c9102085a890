"""W4A8 in plain torch: int4 weights in groups, activations in int8 with one scale a token.

y[t, o] = x_scale[t] * sum over groups g of w_scale[o, g] * dot(x[t, g], w[o, g] - zero[o, g])

Legend: T tokens, I inputs, O outputs, D hidden, H heads, A experts, K experts of a token, F gate and up.
"""

import torch
from torch import Tensor

from moe_worker.kernels.reference import swiglu
from moe_worker.quant.int4 import Int4Weight
from moe_worker.quant.int8 import quantize_tokens


def round_tokens(x_TI: Tensor) -> Tensor:
    """x as the int8 kernels see it, float32 [T, I]."""
    values_TI, scale_T = quantize_tokens(x_TI)
    return values_TI.float() * scale_T.unsqueeze(-1)


def linear_w4a8(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """[T, I] to float32 [T, O]."""
    y_TO = round_tokens(x_TI) @ weight.dequantize(torch.float32).T
    return y_TO if bias_O is None else y_TO + bias_O


def experts_w4a8(
    x_TD: Tensor, gate_up_AFD: Int4Weight, down_ADI: Int4Weight, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Weighted sum over each token's SwiGLU experts, whose hidden values are rounded anew; float32 [T, D]."""
    gate_up, down = gate_up_AFD.dequantize(torch.float32), down_ADI.dequantize(torch.float32)
    rounded_TD = round_tokens(x_TD)
    out_TD = torch.zeros(x_TD.shape[0], down.shape[1])
    for t in range(x_TD.shape[0]):
        for expert, weight in zip(experts_TK[t].tolist(), weights_TK[t], strict=True):
            hidden_1I = round_tokens(swiglu(rounded_TD[t : t + 1] @ gate_up[expert].T))
            out_TD[t] += weight * (hidden_1I @ down[expert].T)[0]
    return out_TD


def heads_w8a8(x_THI: Tensor, weight_HOI: Tensor) -> Tensor:
    """One projection a head; weights int8 by head and output row, x int8 by token and head: [T, H, O]."""
    largest_HO1 = weight_HOI.abs().amax(dim=-1, keepdim=True)
    scale_HO1 = torch.where(largest_HO1 > 0, largest_HO1 / 127, torch.ones_like(largest_HO1))
    rounded_HOI = (weight_HOI / scale_HO1).round() * scale_HO1
    return torch.einsum("thi,hoi->tho", round_tokens(x_THI), rounded_HOI)
