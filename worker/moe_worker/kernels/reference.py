"""Operations of the model in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation (arXiv:1910.07467) over the last axis; keeps the dtype.

    Computes in float32 and rounds before it multiplies by the weight, as DeepSeek's own code does.
    """
    if x_TD.dtype == torch.float32:
        return functional.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    return weight_D * functional.rms_norm(x_TD.float(), weight_D.shape, None, eps).to(x_TD.dtype)


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202), where gate and up are the halves of the last axis."""
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return functional.silu(gate) * up


def group_by_expert(experts_TK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The order that groups rows t * K + k by expert, int64 [M], and the end of each of the `count` experts'
    rows in it, int32 [A]. Rows of no expert (-1) follow those of the last.
    """
    keys_M = experts_TK.flatten()
    sorted_M, order_M = keys_M.remainder(count + 1).sort(stable=True)  # -1 becomes `count`
    numbers_A = torch.arange(count, device=keys_M.device, dtype=keys_M.dtype)
    return order_M, torch.searchsorted(sorted_M, numbers_A, right=True, out_int32=True)


def grouped_linear(x_MI: Tensor, weights_AOI: Tensor, ends_A: Tensor) -> Tensor:
    """Multiplies rows ends[a - 1] to ends[a] of x by weights[a] transposed; [M, O].

    `ends_A` (int32) is non-decreasing. Rows after the last end are not written. torch's own grouped product
    needs rows of whole 16-byte pieces, and bfloat16 on CUDA; otherwise a plain loop computes it.
    """
    aligned = all(size * x_MI.element_size() % 16 == 0 for size in weights_AOI.shape[1:])
    if aligned and (x_MI.device.type == "cpu" or x_MI.dtype == torch.bfloat16):
        return functional.grouped_mm(x_MI, weights_AOI.transpose(1, 2), offs=ends_A)
    out_MO = x_MI.new_empty(x_MI.shape[0], weights_AOI.shape[1])
    start = 0
    for weight_OI, end in zip(weights_AOI, ends_A.tolist(), strict=True):
        if end > start:
            torch.mm(x_MI[start:end], weight_OI.t(), out=out_MO[start:end])
        start = end
    return out_MO
