"""Fused experts: tokens sorted by expert on the device, gate and up with SwiGLU, down with the weights.

Each expert's rows are padded to whole blocks; the grid is as large as blocks could ever be, and programs
behind the last block end at once, so that the host never waits for the counts.

Legend: T tokens, K experts a token, M = T * K rows (row t * K + k), D hidden, I intermediate, F = 2 * I (gate
then up), A experts, C blocks of rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.norm import Activation
from moe_worker.kernels.triton.tiles import ASSEMBLY, PackedInt4, dot_int4_group, store_int8_NM


class Blocks(NamedTuple):
    """Rows in blocks of one expert each: int32 [C * size] rows (M: none) and int32 [C] experts (-1: none)."""

    rows: Tensor
    experts_C: Tensor
    size: int


@triton.jit
def _sort(
    experts, counts, rows, block_experts, total, blocks,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    blocks_E = (tl.load(counts + e, mask=e < EXPERTS, other=0) + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(e < own, blocks_E, 0))
    mine = tl.sum(tl.where(e == own, blocks_E, 0))
    i = tl.arange(0, CHUNK)
    found = 0
    for start in range(0, total, CHUNK):
        chosen = tl.load(experts + start + i, mask=start + i < total, other=-1) == own
        at = first * BLOCK_M + found + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(rows + at, start + i, mask=chosen)
        found += tl.sum(chosen.to(tl.int32))
    m = tl.arange(0, BLOCK_M)
    tl.store(rows + first * BLOCK_M + found + m, total, mask=found + m < mine * BLOCK_M)
    for start in range(0, mine, 64):
        b = start + tl.arange(0, 64)
        tl.store(block_experts + first + b, own, mask=b < mine)
    if own == EXPERTS - 1:
        for start in range(first + mine, blocks, 64):
            b = start + tl.arange(0, 64)
            tl.store(block_experts + b, -1, mask=b < blocks)


def sort_by_expert(experts_TK: Tensor, counts_A: Tensor, size: int) -> Blocks:
    """Blocks of `size` rows, each of one expert, rows in rising order; `counts_A` is the histogram."""
    total, experts = experts_TK.numel(), counts_A.shape[0]
    blocks = total // size + min(experts, total)
    device = experts_TK.device
    rows = torch.empty(blocks * size, dtype=torch.int32, device=device)
    experts_C = torch.empty(blocks, dtype=torch.int32, device=device)
    _sort[(experts,)](
        experts_TK, counts_A, rows, experts_C, total, blocks,
        EXPERTS=experts, BLOCK_E=triton.next_power_of_2(experts), BLOCK_M=size,
        CHUNK=min(2048, max(32, triton.next_power_of_2(total))), num_warps=4,
    )  # fmt: skip
    return Blocks(rows, experts_C, size)


@triton.jit
def _swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _gate_up_w4a8(
    x, x_scale, packed, scales, rows, block_experts, out, out_scale, total,
    PER_TOKEN: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert >= 0:
        row_M = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
        mask_M = row_M < total
        token_M = row_M // PER_TOKEN
        first = tl.program_id(0) * BLOCK_N
        n = first + tl.arange(0, BLOCK_N)
        weight = packed + expert * (GROUPS * 2 * INNER * 64)
        scale = scales + expert * (GROUPS * 2 * INNER)
        gate_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for group in range(GROUPS):
            gate_NM = dot_int4_group(
                gate_NM, weight, scale, x, x_scale, group, n, token_M, mask_M, 2 * INNER, GROUPS * 2, ASSEMBLY
            )
            up_NM = dot_int4_group(
                up_NM,
                weight,
                scale,
                x,
                x_scale,
                group,
                INNER + n,
                token_M,
                mask_M,
                2 * INNER,
                GROUPS * 2,
                ASSEMBLY,
            )
        hidden_NM = _swiglu(gate_NM, up_NM)
        store_int8_NM(hidden_NM, out, out_scale, row_M.to(tl.int64), first, mask_M, INNER, BLOCK_N)


@triton.jit
def _down_w4a8(
    x, x_scale, packed, scales, rows, block_experts, weights, out, total,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert >= 0:
        row_M = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
        mask_M = row_M < total
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight = packed + expert * (GROUPS * OUTPUTS * 64)
        scale = scales + expert * (GROUPS * OUTPUTS)
        acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for group in range(GROUPS):
            acc_NM = dot_int4_group(
                acc_NM, weight, scale, x, x_scale, group, n, row_M, mask_M, OUTPUTS, GROUPS * 2, ASSEMBLY
            )
        share_M = tl.load(weights + row_M, mask=mask_M, other=0.0)
        where = out + row_M[None, :].to(tl.int64) * OUTPUTS + n[:, None]
        tl.store(where, (acc_NM * share_M[None, :]).to(tl.bfloat16), mask=mask_M[None, :])


@triton.jit
def _gate_up_bf16(
    x, weight, rows, block_experts, out, total,
    PER_TOKEN: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert >= 0:
        row_M = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
        mask_M = row_M < total
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_kM = x + (row_M // PER_TOKEN)[None, :] * WIDTH + k[:, None]
        gate_Nk = weight + expert * (2 * INNER * WIDTH) + n[:, None] * WIDTH + k[None, :]
        gate_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for _ in range(WIDTH // BLOCK_K):
            values_kM = tl.load(x_kM, mask=mask_M[None, :], other=0.0)
            gate_NM = tl.dot(tl.load(gate_Nk), values_kM, acc=gate_NM)
            up_NM = tl.dot(tl.load(gate_Nk + INNER * WIDTH), values_kM, acc=up_NM)
            x_kM += BLOCK_K
            gate_Nk += BLOCK_K
        where = out + row_M[None, :].to(tl.int64) * INNER + n[:, None]
        tl.store(where, _swiglu(gate_NM, up_NM).to(tl.bfloat16), mask=mask_M[None, :])


@triton.jit
def _down_bf16(
    x, weight, rows, block_experts, weights, out, total,
    OUTPUTS: tl.constexpr, INNER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert >= 0:
        row_M = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_M = row_M < total
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_kM = x + row_M[None, :] * INNER + k[:, None]
        w_Nk = weight + expert * (OUTPUTS * INNER) + n[:, None] * INNER + k[None, :]
        acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for _ in range(INNER // BLOCK_K):
            acc_NM = tl.dot(tl.load(w_Nk), tl.load(x_kM, mask=mask_M[None, :], other=0.0), acc=acc_NM)
            x_kM += BLOCK_K
            w_Nk += BLOCK_K
        share_M = tl.load(weights + row_M, mask=mask_M, other=0.0)
        where = out + row_M[None, :] * OUTPUTS + n[:, None]
        tl.store(where, (acc_NM * share_M[None, :]).to(tl.bfloat16), mask=mask_M[None, :])


def block_size(tokens: int, quantized: bool) -> int:
    """Rows of one block: about as many as an expert gets, but where sums of each group are scaled one by one
    no more than 32, as they take registers.
    """
    if quantized:
        return 16 if tokens <= 64 else 32
    return 16 if tokens <= 128 else 32 if tokens <= 512 else 64 if tokens <= 2048 else 128


def experts_w4a8(
    x: Activation, gate_up: PackedInt4, down: PackedInt4, blocks: Blocks, weights_TK: Tensor
) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D], to be summed over K; hidden values are int8, in 64s."""
    tokens, per_token = weights_TK.shape
    total, inner, size = tokens * per_token, gate_up.outputs // 2, blocks.size
    hidden = Activation.empty(total, inner, x.q_TD.device)
    out_MD = torch.empty(total, down.outputs, dtype=torch.bfloat16, device=x.q_TD.device)
    count = blocks.experts_C.shape[0]
    _gate_up_w4a8[(inner // 64, count)](
        x.q_TD, x.scales_TX, gate_up.packed.view(torch.int8), gate_up.scales, blocks.rows, blocks.experts_C,
        hidden.q_TD, hidden.scales_TX, total,
        PER_TOKEN=per_token, INNER=inner, GROUPS=gate_up.groups, BLOCK_N=64, BLOCK_M=size,
        ASSEMBLY=ASSEMBLY,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _down_w4a8[(down.outputs // 64, count)](
        hidden.q_TD, hidden.scales_TX, down.packed.view(torch.int8), down.scales, blocks.rows,
        blocks.experts_C, weights_TK, out_MD, total,
        OUTPUTS=down.outputs, GROUPS=down.groups, BLOCK_N=64, BLOCK_M=size, ASSEMBLY=ASSEMBLY,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out_MD


def experts_bf16(
    x_TD: Tensor, gate_up_AFD: Tensor, down_ADI: Tensor, blocks: Blocks, weights_TK: Tensor
) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D], to be summed over K."""
    tokens, per_token = weights_TK.shape
    total, inner, width, size = tokens * per_token, down_ADI.shape[2], x_TD.shape[1], blocks.size
    hidden_MI = torch.empty(total, inner, dtype=torch.bfloat16, device=x_TD.device)
    out_MD = torch.empty(total, width, dtype=torch.bfloat16, device=x_TD.device)
    up_n = 64 if size < 64 or inner % 128 else 128
    down_n = 64 if size < 64 or width % 128 else 128
    count = blocks.experts_C.shape[0]
    _gate_up_bf16[(inner // up_n, count)](
        x_TD, gate_up_AFD, blocks.rows, blocks.experts_C, hidden_MI, total,
        PER_TOKEN=per_token, INNER=inner, WIDTH=width, BLOCK_N=up_n, BLOCK_M=size,
        BLOCK_K=128 if size < 64 and width % 128 == 0 else 64, num_warps=4 if size < 64 else 8, num_stages=3,
    )  # fmt: skip
    _down_bf16[(width // down_n, count)](
        hidden_MI, down_ADI, blocks.rows, blocks.experts_C, weights_TK, out_MD, total,
        OUTPUTS=width, INNER=inner, BLOCK_N=down_n, BLOCK_M=size,
        BLOCK_K=128 if size < 64 and inner % 128 == 0 else 64, num_warps=4 if size < 64 else 8,
        num_stages=4 if size < 64 else 3,
    )  # fmt: skip
    return out_MD
