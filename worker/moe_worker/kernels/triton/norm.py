"""Residual, RMS norm and rounding to int8 in one pass over the row.

Legend: T tokens, D hidden, S rows that are summed for a token, X pieces of inputs.
"""

from dataclasses import dataclass
from enum import Enum

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.launch import launch, wait_for_inputs
from moe_worker.kernels.triton.tiles import by_position, e4m3_scale, int8_scale, round_even, to_e4m3
from moe_worker.quant.fp8 import E4M3
from moe_worker.quant.int8 import piece_of


class Rounding(Enum):
    """What reads the result: products in bf16, products in int8, bf16 ones that are to equal int8 ones,
    products in e4m3, or int8 ones with 1:4 sparse weights.
    """

    NONE = 0
    INT8 = 1
    EMULATED = 2
    E4M3 = 3
    BY_POSITION = 4


@dataclass(frozen=True)
class Activation:
    """A tensor [T, D] in bf16, and where products in int8 or e4m3 read it, such values [T, D] and their
    float32 scales [T, X].
    """

    x_TD: Tensor
    q_TD: Tensor
    scales_TX: Tensor

    @classmethod
    def empty(cls, tokens: int, width: int, device: torch.device, piece: int = 0) -> "Activation":
        """Memory for `tokens` rows of `width`, a multiple of 64. piece: inputs that share a scale."""
        piece = piece or piece_of(width)
        return cls(
            torch.empty(tokens, width, dtype=torch.bfloat16, device=device),
            torch.empty(tokens, width, dtype=torch.int8, device=device),
            torch.empty(tokens, width // piece, dtype=torch.float32, device=device),
        )

    @classmethod
    def empty_for(
        cls, rounding: Rounding, tokens: int, width: int, device: torch.device, piece: int = 0
    ) -> "Activation":
        """Memory for what `rounding` gives: in e4m3 a row has one scale."""
        if rounding is not Rounding.E4M3:
            return cls.empty(tokens, width, device, piece)
        each = cls.empty(tokens, width, device, width)
        return cls(each.x_TD, each.q_TD.view(E4M3), each.scales_TX)

    def empty_like(self, tokens: int) -> "Activation":
        """Memory for `tokens` rows of the same kind."""
        each = Activation.empty(tokens, self.x_TD.shape[1], self.x_TD.device, self.piece)
        return Activation(each.x_TD, each.q_TD.view(self.q_TD.dtype), each.scales_TX)

    @property
    def piece(self) -> int:
        """Inputs that share a scale: 64, 128, or all of a row."""
        return self.x_TD.shape[1] // self.scales_TX.shape[1]


@triton.jit
def _residual_norm(
    residual, added, order, experts, weight, out, out_q, out_scale, stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr, ORDERED: tl.constexpr,
    CHOSEN: tl.constexpr, ROUNDING: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < WIDTH
    weight_D = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs()
    x = tl.load(residual + t * stride + d, mask=mask, other=0.0).to(tl.float32)
    if SUMMED > 0:
        sums = tl.zeros((BLOCK,), tl.float32)
        for s in tl.static_range(SUMMED):
            row = t * SUMMED + s
            there = mask
            if CHOSEN:
                there = mask & (tl.load(experts + row) >= 0)
            if ORDERED:
                row = tl.load(order + row)
            sums += tl.load(added + row * WIDTH + d, mask=there, other=0.0).to(tl.float32)
        x = (x + sums.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
        tl.store(residual + t * stride + d, x.to(tl.bfloat16), mask=mask)
    normed = (x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps)).to(tl.bfloat16).to(tl.float32)
    y = (normed * weight_D).to(tl.bfloat16)
    if ROUNDING == 3:
        row_scale = e4m3_scale(y.to(tl.float32), 0)
        tl.store(out_q + t * WIDTH + d, to_e4m3(y.to(tl.float32) / row_scale), mask=mask)
        tl.store(out_scale + t, row_scale)
    elif ROUNDING > 0:
        cut = tl.reshape(y.to(tl.float32), (BLOCK // PIECE, PIECE))
        scale = int8_scale(cut, 1)
        steps = round_even(cut / scale[:, None])
        if ROUNDING == 2:
            y = tl.reshape(steps * scale[:, None], (BLOCK,)).to(tl.bfloat16)
        else:
            if ROUNDING == 4:
                steps = by_position(tl.reshape(steps, (BLOCK, 1)))
            tl.store(out_q + t * WIDTH + d, tl.reshape(steps.to(tl.int8), (BLOCK,)), mask=mask)
            x_piece = tl.arange(0, BLOCK // PIECE)
            tl.store(out_scale + t * (WIDTH // PIECE) + x_piece, scale, mask=x_piece < WIDTH // PIECE)
    tl.store(out + t * WIDTH + d, y, mask=mask)


@triton.jit
def _round_pieces(x, out_q, out_scale, WIDTH: tl.constexpr, PIECE: tl.constexpr, ROUNDING: tl.constexpr):
    token, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait_for_inputs()
    at = token * WIDTH + piece * PIECE + tl.arange(0, PIECE)
    y = tl.load(x + at).to(tl.float32)
    scale = int8_scale(y, 0)
    steps = round_even(y / scale)
    if ROUNDING == 1:
        tl.store(out_q + at, steps.to(tl.int8))
        tl.store(out_scale + token * (WIDTH // PIECE) + piece, scale)
    else:
        tl.store(x + at, (steps * scale).to(tl.bfloat16))


@triton.jit
def _round_row(x, out_q, out_scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < WIDTH
    wait_for_inputs()
    y = tl.load(x + token * WIDTH + d, mask=mask, other=0.0).to(tl.float32)
    scale = e4m3_scale(y, 0)
    tl.store(out_q + token * WIDTH + d, to_e4m3(y / scale), mask=mask)
    tl.store(out_scale + token, scale)


def round_values(x: Activation, rounding: Rounding) -> None:
    """Rounds `x.x_TD`, where the kernel that wrote it could not: a scale is of values of several programs."""
    tokens, width = x.x_TD.shape
    if rounding is Rounding.E4M3:
        _round_row[(tokens,)](
            x.x_TD, x.q_TD, x.scales_TX, WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
            **launch(tokens),
        )  # fmt: skip
    elif rounding is not Rounding.NONE:
        _round_pieces[(tokens, width // x.piece)](
            x.x_TD, x.q_TD, x.scales_TX, WIDTH=width, PIECE=x.piece, ROUNDING=rounding.value, num_warps=1,
            **launch(tokens),
        )  # fmt: skip


@dataclass(frozen=True)
class Added:
    """What is to be added to a residual: each token's sum of S rows of `rows_MD`, bf16 [T * S, D].

    order_M: int64, where row t * S + s stands; None: at its place. experts_M: int32, the expert of row
    t * S + s. Nobody has written the rows of no expert (-1), as padding has, and they count as 0. None: all
    rows are written.
    """

    rows_MD: Tensor
    order_M: Tensor | None = None
    experts_M: Tensor | None = None

    def of_tokens(self, tokens_N: Tensor, tokens: int) -> "Added":
        """Those of some of `tokens` tokens."""
        experts_M = None
        if self.experts_M is not None:
            experts_M = self.experts_M.view(tokens, -1)[tokens_N].flatten()
        if self.order_M is None:
            rows_MD = self.rows_MD.unflatten(0, (tokens, -1))[tokens_N].flatten(0, 1)
            return Added(rows_MD, experts_M=experts_M)
        return Added(self.rows_MD, self.order_M.view(tokens, -1)[tokens_N].flatten(), experts_M)

    def per_token(self, tokens: int) -> int:
        """S."""
        return self.rows_MD.shape[0] // tokens if self.order_M is None else self.order_M.shape[0] // tokens


def residual_norm(
    residual_TD: Tensor,
    added: Added | None,
    weight_D: Tensor,
    eps: float,
    out: Activation,
    rounding: Rounding,
) -> None:
    """residual += added; out = norm(residual) * weight.

    Rounds where the plain path in bf16 rounds. Rows of the residual may have any stride.
    """
    tokens, width = residual_TD.shape
    _residual_norm[(tokens,)](
        residual_TD, None if added is None else added.rows_MD, None if added is None else added.order_M,
        None if added is None else added.experts_M,
        weight_D, out.x_TD, out.q_TD, out.scales_TX, residual_TD.stride(0), eps,
        WIDTH=width, BLOCK=max(128, triton.next_power_of_2(width)),
        SUMMED=0 if added is None else added.per_token(tokens),
        ORDERED=added is not None and added.order_M is not None,
        CHOSEN=added is not None and added.experts_M is not None, ROUNDING=rounding.value,
        PIECE=out.piece,
        num_warps=8 if width >= 2048 else 4, **launch(tokens),
    )  # fmt: skip
