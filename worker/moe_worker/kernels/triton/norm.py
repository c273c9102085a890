"""Residual, RMS norm and rounding to int8 in one pass over the row.

Legend: T tokens, D hidden, S outputs that are summed for a token, X pieces of 64 inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.tiles import round_even


@dataclass(frozen=True)
class Activation:
    """A tensor [T, D] in bf16, and where int8 products read it, int8 [T, D] and float32 [T, D / 64]."""

    x_TD: Tensor
    q_TD: Tensor
    scales_TX: Tensor

    @classmethod
    def empty(cls, tokens: int, width: int, device: torch.device) -> "Activation":
        """Memory for `tokens` rows of `width`, a multiple of 64."""
        return cls(
            torch.empty(tokens, width, dtype=torch.bfloat16, device=device),
            torch.empty(tokens, width, dtype=torch.int8, device=device),
            torch.empty(tokens, width // 64, dtype=torch.float32, device=device),
        )


@triton.jit
def _residual_norm(
    residual, added, weight, out, out_q, out_scale, stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    mask = d < WIDTH
    x = tl.load(residual + t * stride + d, mask=mask, other=0.0).to(tl.float32)
    if SUMMED > 0:
        sums = tl.zeros((BLOCK,), tl.float32)
        for s in tl.static_range(SUMMED):
            sums += tl.load(added + (t * SUMMED + s) * WIDTH + d, mask=mask, other=0.0).to(tl.float32)
        x = (x + sums.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
        tl.store(residual + t * stride + d, x.to(tl.bfloat16), mask=mask)
    normed = (x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps)).to(tl.bfloat16).to(tl.float32)
    y = (normed * tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)).to(tl.bfloat16)
    tl.store(out + t * WIDTH + d, y, mask=mask)
    if QUANTIZED:
        cut = tl.reshape(y.to(tl.float32), (BLOCK // 64, 64))
        top = tl.max(tl.abs(cut), axis=1)
        scale = tl.where(top > 0.0, top / 127.0, 1.0)
        q = tl.reshape(round_even(cut / scale[:, None]).to(tl.int8), (BLOCK,))
        tl.store(out_q + t * WIDTH + d, q, mask=mask)
        x_piece = tl.arange(0, BLOCK // 64)
        tl.store(out_scale + t * (WIDTH // 64) + x_piece, scale, mask=x_piece < WIDTH // 64)


def residual_norm(
    residual_TD: Tensor,
    added_SD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    out: Activation,
    quantized: bool,
) -> None:
    """residual += the sum of each token's S rows of `added_SD` [T * S, D]; out = norm(residual) * weight.

    Rounds where the plain path in bf16 rounds. Rows of the residual may have any stride.
    """
    tokens, width = residual_TD.shape
    _residual_norm[(tokens,)](
        residual_TD, added_SD, weight_D, out.x_TD, out.q_TD, out.scales_TX, residual_TD.stride(0), eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width),
        SUMMED=0 if added_SD is None else added_SD.shape[0] // tokens, QUANTIZED=quantized,
        num_warps=8 if width >= 2048 else 4,
    )  # fmt: skip
