"""W4A8 in plain torch, written apart from the model: int4 weights in groups, int8 activations in pieces.

y[t, o] = sum over inputs i, in group g and piece p, of
    w_scale[o, g] * (w[o, i] - zero[o, g]) * x_scale[t, p] * x[t, i]

Legend: T tokens, I inputs, O outputs, D hidden, H heads, A experts, K experts of a token, F gate and up.
"""

import torch
from torch import Tensor

from moe_worker.kernels.reference import swiglu
from moe_worker.quant.int4 import Int4Weight
from moe_worker.quant.int8 import piece_of, round_pieces


def linear_w4a8(
    x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None, piece: int | None = None
) -> Tensor:
    """[T, I] to float32 [T, O]."""
    y_TO = round_pieces(x_TI, piece or piece_of(x_TI.shape[1])) @ weight.dequantize(torch.float32).T
    return y_TO if bias_O is None else y_TO + bias_O


def experts_w4a8(
    x_TD: Tensor, gate_up_AFD: Int4Weight, down_ADI: Int4Weight, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Weighted sum over each token's SwiGLU experts, whose hidden values are rounded, too; float32 [T, D]."""
    gate_up, down = gate_up_AFD.dequantize(torch.float32), down_ADI.dequantize(torch.float32)
    rounded_TD = round_pieces(x_TD, piece_of(x_TD.shape[1]))
    out_TD = torch.zeros(x_TD.shape[0], down.shape[1])
    for t in range(x_TD.shape[0]):
        for expert, weight in zip(experts_TK[t].tolist(), weights_TK[t], strict=True):
            hidden_1I = swiglu(rounded_TD[t : t + 1] @ gate_up[expert].T)
            out_TD[t] += weight * (round_pieces(hidden_1I, piece_of(hidden_1I.shape[1])) @ down[expert].T)[0]
    return out_TD


def heads_w4a8(x_THI: Tensor, weight_HOI: Tensor) -> Tensor:
    """One projection a head: int8 weights with a power of two for each output, x in bfloat16; [T, H, O]."""
    largest_HO1 = weight_HOI.double().abs().amax(dim=2, keepdim=True)
    scales_HO1 = 2 ** (largest_HO1 / 127).log2().clamp(min=-126).ceil()
    rounded_HOI = (weight_HOI.double() / scales_HO1).round() * scales_HO1
    return torch.einsum("thi,hoi->tho", x_THI.bfloat16().double(), rounded_HOI).float()
