"""Products of activations with one int4 matrix (W4A8).

Legend: T tokens, O outputs, G groups of 128 inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.norm import Activation
from moe_worker.kernels.triton.tiles import ASSEMBLY, PackedInt4, dot_int4_group


@triton.jit
def _linear_w4a8(
    x, x_scale, packed, scales, out, tokens,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_N = tl.minimum(n, OUTPUTS - 1)
    token_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_M = token_M < tokens
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(GROUPS):
        acc_NM = dot_int4_group(
            acc_NM, packed, scales, x, x_scale, group, rows_N, token_M, mask_M, OUTPUTS, GROUPS * 2, ASSEMBLY
        )
    where = out + token_M[None, :].to(tl.int64) * OUTPUTS + n[:, None]
    tl.store(where, acc_NM.to(out.dtype.element_ty), mask=mask_M[None, :] & (n < OUTPUTS)[:, None])


def linear_w4a8(x: Activation, weight: PackedInt4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[T, O] in `dtype`: sums of int8 products, scaled in float32 for each 64 inputs."""
    tokens = x.q_TD.shape[0]
    out_TO = torch.empty(tokens, weight.outputs, dtype=dtype, device=x.q_TD.device)
    wide = weight.outputs > 32768 or tokens > 64
    block_n, block_m = 128 if wide else 64, 16 if tokens <= 16 or not wide else 32
    grid = (triton.cdiv(weight.outputs, block_n), triton.cdiv(tokens, block_m))
    _linear_w4a8[grid](
        x.q_TD, x.scales_TX, weight.packed.view(torch.int8), weight.scales, out_TO, tokens,
        OUTPUTS=weight.outputs, GROUPS=weight.groups, BLOCK_N=block_n, BLOCK_M=block_m, ASSEMBLY=ASSEMBLY,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out_TO
