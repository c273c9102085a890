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

from moe_worker.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from moe_worker.kernels.triton.norm import Activation
from moe_worker.kernels.triton.packed import Packed, PackedSparse14
from moe_worker.kernels.triton.products import Tile, add_product, dot_group
from moe_worker.kernels.triton.tiles import add_dot_bf16, by_position, store_int8_NM


class Blocks(NamedTuple):
    """Rows in blocks of one expert each: int32 [C * size] rows (M: none) and int32 [C] experts (-1: none).

    done_C: int32, how many programs of the first product have written hidden values of each block; zeros at
    first. Blocks therefore serve one pass.
    """

    rows: Tensor
    experts_C: Tensor
    size: int
    done_C: Tensor


@triton.jit(do_not_specialize=["total", "blocks"])
def _sort(
    experts, counts, rows, block_experts, done, total, blocks,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    i, e = tl.arange(0, CHUNK), tl.arange(0, BLOCK_E)
    wait_for_inputs()
    # Loaded before anything is summed.
    chosen = tl.load(experts + i, mask=i < total, other=-1) == own
    blocks_E = (tl.load(counts + e, mask=e < EXPERTS, other=0) + BLOCK_M - 1) // BLOCK_M
    mine = tl.sum(tl.where(e == own, blocks_E, 0))
    # Experts with the most blocks first: after the first block their weights come from the cache, so that
    # their programs run well together with those that read weights from memory.
    before_E = (blocks_E > mine) | ((blocks_E == mine) & (e < own))
    first = tl.sum(tl.where(before_E, blocks_E, 0))
    found = 0
    for start in range(0, total, CHUNK):
        at = first * BLOCK_M + found + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(rows + at, start + i, mask=chosen)
        found += tl.sum(chosen.to(tl.int32))
        chosen = tl.load(experts + start + CHUNK + i, mask=start + CHUNK + i < total, other=-1) == own
    m = tl.arange(0, BLOCK_M)
    tl.store(rows + first * BLOCK_M + found + m, total, mask=found + m < mine * BLOCK_M)
    for start in range(0, mine, 64):
        b = start + tl.arange(0, 64)
        tl.store(block_experts + first + b, own, mask=b < mine)
        tl.store(done + first + b, 0, mask=b < mine)
    if own == 0:
        for start in range(tl.sum(blocks_E), blocks, 64):
            b = start + tl.arange(0, 64)
            tl.store(block_experts + b, -1, mask=b < blocks)


def sort_by_expert(experts_TK: Tensor, counts_A: Tensor, size: int) -> Blocks:
    """Blocks of `size` rows, each of one expert, rows in rising order; `counts_A` is the histogram."""
    total, experts = experts_TK.numel(), counts_A.shape[0]
    blocks = total // size + min(experts, total)
    device = experts_TK.device
    rows = torch.empty(blocks * size, dtype=torch.int32, device=device)
    experts_C, done_C = (torch.empty(blocks, dtype=torch.int32, device=device) for _ in range(2))
    _sort[(experts,)](
        experts_TK, counts_A, rows, experts_C, done_C, total, blocks,
        EXPERTS=experts, BLOCK_E=triton.next_power_of_2(experts), BLOCK_M=size,
        CHUNK=256 if total <= 256 else 2048, num_warps=4, **launch(experts_TK.shape[0]),
    )  # fmt: skip
    return Blocks(rows, experts_C, size, done_C)


@triton.jit
def _swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


# A block of more rows than this, of which at most half are used, is multiplied in a tile of half as many.
_WHOLE = tl.constexpr(32)


@triton.jit
def _has_more(rows, total, BLOCK_M: tl.constexpr):
    """Whether a block has more rows than half."""
    return tl.load(rows + BLOCK_M // 2) < total


@triton.jit
def _write_hidden(
    x, x_scale, weight, scale, row_M, out, out_scale, total, first,
    PER_TOKEN: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr,
    PIECE: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, TURN: tl.constexpr, STAGES: tl.constexpr,
    READER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N hidden values of some rows of an expert. `weight` and `scale` stand at the first one's gate."""
    BLOCK_M: tl.constexpr = row_M.shape[0]
    mask_M = row_M < total
    token_M = tl.minimum(row_M, total - 1) // PER_TOKEN
    n = tl.arange(0, BLOCK_N)
    gate_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Two products of BLOCK_N rows: one of twice as many takes more registers.
    for group in tl.range(0, GROUPS, TURN, num_stages=STAGES):
        for i in tl.static_range(TURN):
            gate_NM = dot_group(
                gate_NM, weight, scale, x, x_scale, group, n, token_M, mask_M,
                2 * INNER, GROUPS, INPUTS, PIECE, KIND, TURN, i, BLOCK_M > _WHOLE,
            )  # fmt: skip
            up_NM = dot_group(
                up_NM, weight + INNER * ROW, scale + INNER, x, x_scale, group, n, token_M, mask_M,
                2 * INNER, GROUPS, INPUTS, PIECE, KIND, TURN, i, BLOCK_M > _WHOLE,
            )  # fmt: skip
    hidden_NM = _swiglu(gate_NM, up_NM)
    if KIND == "w4a8" or KIND == "s14":  # noqa: PLR1714 - Triton has no sets
        if READER == "s14":
            hidden_NM = by_position(hidden_NM)
        store_int8_NM(hidden_NM, out, out_scale, row_M.to(tl.int64), first, mask_M, INNER, BLOCK_N)
    else:
        where = out + row_M[None, :].to(tl.int64) * INNER + first + n[:, None]
        tl.store(where, hidden_NM.to(tl.bfloat16), mask=mask_M[None, :])


@triton.jit(do_not_specialize=["total"])
def _gate_up_packed(
    x, x_scale, packed, scales, rows, block_experts, done, out, out_scale, total,
    PER_TOKEN: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr,
    PIECE: tl.constexpr, STRIDE: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, TURN: tl.constexpr,
    STAGES: tl.constexpr, READER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """ROW: elements from one row of weights to the next. READER: KIND of what multiplies hidden values."""
    block = tl.program_id(1)
    wait_for_inputs()
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert >= 0:
        own = rows + block * BLOCK_M
        row_M = tl.load(own + tl.arange(0, BLOCK_M))
        first = tl.program_id(0) * BLOCK_N
        weight = packed + expert * STRIDE + first * ROW
        scale = scales + expert * (GROUPS * 2 * INNER) + first
        more = BLOCK_M <= _WHOLE
        if BLOCK_M > _WHOLE:
            more = _has_more(own, total, BLOCK_M)
        if more:
            _write_hidden(
                x, x_scale, weight, scale, row_M, out, out_scale, total, first,
                PER_TOKEN, INNER, GROUPS, INPUTS, PIECE, ROW, KIND, TURN, STAGES, READER, BLOCK_N,
            )  # fmt: skip
        else:
            _write_hidden(
                x, x_scale, weight, scale, tl.load(own + tl.arange(0, BLOCK_M // 2)), out, out_scale, total,
                first, PER_TOKEN, INNER, GROUPS, INPUTS, PIECE, ROW, KIND, TURN, STAGES, READER, BLOCK_N,
            )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(done + block, 1, sem="release")


@triton.jit
def _write_outputs(
    x, x_scale, weight, scale, row_M, weights, out, total, first,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, PIECE: tl.constexpr,
    KIND: tl.constexpr, TURN: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of some rows of an expert. `weight` and `scale` stand at the first one."""
    BLOCK_M: tl.constexpr = row_M.shape[0]
    mask_M = row_M < total
    n = tl.arange(0, BLOCK_N)
    y_NM = add_product(
        tl.zeros((BLOCK_N, BLOCK_M), tl.float32), weight, scale, x, x_scale, n,
        tl.minimum(row_M, total - 1), mask_M,
        OUTPUTS, GROUPS, INPUTS, PIECE, KIND, TURN, STAGES, BLOCK_M > _WHOLE,
    )  # fmt: skip
    share_M = tl.load(weights + row_M, mask=mask_M, other=0.0)
    where = out + row_M[None, :].to(tl.int64) * OUTPUTS + first + n[:, None]
    tl.store(where, (y_NM * share_M[None, :]).to(tl.bfloat16), mask=mask_M[None, :])


@triton.jit(do_not_specialize=["total"])
def _down_packed(
    x, x_scale, packed, scales, rows, block_experts, done, weights, out, total,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, PIECE: tl.constexpr,
    STRIDE: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, TURN: tl.constexpr, STAGES: tl.constexpr,
    AWAITED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    if AWAITED == 0:
        wait_for_inputs()
    else:
        # This kernel starts once all programs of the first product have waited for the kernels before, on the
        # multiprocessors that the last of them leave free.
        let_next_start()
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert >= 0:
        own = rows + block * BLOCK_M
        row_M = tl.load(own + tl.arange(0, BLOCK_M))
        more = BLOCK_M <= _WHOLE
        if BLOCK_M > _WHOLE:
            more = _has_more(own, total, BLOCK_M)
        if AWAITED > 0:
            while tl.atomic_add(done + block, 0, sem="acquire") < AWAITED:
                pass
            tl.debug_barrier()
        first = tl.program_id(0) * BLOCK_N
        weight = packed + expert * STRIDE + first * ROW
        scale = scales + expert * (GROUPS * OUTPUTS) + first
        if more:
            _write_outputs(
                x, x_scale, weight, scale, row_M, weights, out, total, first,
                OUTPUTS, GROUPS, INPUTS, PIECE, KIND, TURN, STAGES, BLOCK_N,
            )  # fmt: skip
        else:
            _write_outputs(
                x, x_scale, weight, scale, tl.load(own + tl.arange(0, BLOCK_M // 2)), weights, out, total,
                first, OUTPUTS, GROUPS, INPUTS, PIECE, KIND, TURN, STAGES, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["total"])
def _gate_up_bf16(
    x, weight, rows, block_experts, out, total,
    PER_TOKEN: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    wait_for_inputs()
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
            gate_NM = add_dot_bf16(gate_NM, tl.load(gate_Nk), values_kM)
            up_NM = add_dot_bf16(up_NM, tl.load(gate_Nk + INNER * WIDTH), values_kM)
            x_kM += BLOCK_K
            gate_Nk += BLOCK_K
        where = out + row_M[None, :].to(tl.int64) * INNER + n[:, None]
        tl.store(where, _swiglu(gate_NM, up_NM).to(tl.bfloat16), mask=mask_M[None, :])


@triton.jit(do_not_specialize=["total"])
def _down_bf16(
    x, weight, rows, block_experts, weights, out, total,
    OUTPUTS: tl.constexpr, INNER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    wait_for_inputs()
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
            acc_NM = add_dot_bf16(acc_NM, tl.load(w_Nk), tl.load(x_kM, mask=mask_M[None, :], other=0.0))
            x_kM += BLOCK_K
            w_Nk += BLOCK_K
        share_M = tl.load(weights + row_M, mask=mask_M, other=0.0)
        where = out + row_M[None, :] * OUTPUTS + n[:, None]
        tl.store(where, (acc_NM * share_M[None, :]).to(tl.bfloat16), mask=mask_M[None, :])


# Up to so many tokens the down product has too few programs to start before the first one has ended.
WAITING_TOKENS = 8


# Rows of an expert, on average, above which blocks have 64 rows in W4A8. On an H200, a step of 1,024 tokens
# of DeepSeek-V2-Lite (124 rows) then takes 11.3 instead of 11.4 ms, of 2,048 20.5 instead of 21.4, and of 512
# 6.9 instead of 6.8.
MANY_ROWS = 96


class ExpertTiles(NamedTuple):
    """How the two products of experts are cut; both take rows in blocks of the same size."""

    gate_up: Tile
    down: Tile

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.down.m


def expert_tiles(tokens: int, kind: str | None, mean: float = 0.0) -> ExpertTiles:
    """Blocks of about as many rows as an expert gets, but packed, where the sums of each group take
    registers, of no more than 32, or of 64 in W4A8 with many rows. kind: that of packed weights; None: bf16.
    mean: rows of an expert.
    """
    if kind == "w4a8":
        return _w4a8_tiles(tokens, mean)
    if kind is not None:
        tile = Tile(128, 16 if tokens <= 64 else 32, 4, 3)
        if kind == "s14":
            return ExpertTiles(tile, tile)
        return ExpertTiles(tile._replace(n=64), tile if tokens <= 64 else tile._replace(warps=8))
    rows = 16 if tokens <= 128 else 32 if tokens <= 512 else 64 if tokens <= 2048 else 128
    if rows < 64:
        return ExpertTiles(Tile(64, rows, 4, 3), Tile(64, rows, 4, 4))
    return ExpertTiles(Tile(128, rows, 8, 3), Tile(128, rows, 8, 3))


def _w4a8_tiles(tokens: int, mean: float) -> ExpertTiles:
    if mean > MANY_ROWS:
        tile = Tile(128, 64, 4, 3)
        return ExpertTiles(tile, tile)
    tile = Tile(128, 16 if tokens <= 64 else 32, 4, 3)
    # Four programs of the first product share a multiprocessor from 17 to 64 tokens; else three, with more
    # loaded ahead up to 16 tokens.
    if tokens > 64:
        return ExpertTiles(tile._replace(registers=168), tile)
    return ExpertTiles(tile._replace(stages=4) if tokens <= 16 else tile, tile)


def gate_up_packed(
    x: Activation,
    gate_up: Packed,
    blocks: Blocks,
    rows: int,
    per_token: int,
    tile: Tile,
    reader: str = "w4a8",
) -> Activation:
    """Hidden values of `rows` rows; W4A8 rounds them to int8, with a scale for each piece of tile.n.

    reader: the kind of the weights that multiply the values, whose order they get.
    """
    inner, int8 = gate_up.outputs // 2, gate_up.int8
    block_n = fitting(tile.n, inner)
    hidden = Activation.empty(rows, inner, x.x_TD.device, block_n)
    _gate_up_packed[(inner // block_n, blocks.experts_C.shape[0])](
        x.q_TD if int8 else x.x_TD, x.scales_TX, gate_up.stored, gate_up.scales, blocks.rows,
        blocks.experts_C, blocks.done_C, hidden.q_TD if int8 else hidden.x_TD, hidden.scales_TX, rows,
        PER_TOKEN=per_token, INNER=inner, GROUPS=gate_up.groups, INPUTS=gate_up.inputs,
        PIECE=x.piece, STRIDE=gate_up.stride, ROW=gate_up.row_stride, KIND=gate_up.kind,
        TURN=_turn(gate_up, tile), STAGES=tile.stages, READER=reader, BLOCK_N=block_n, BLOCK_M=blocks.size,
        **tile.options, **launch(rows // per_token),
    )  # fmt: skip
    return hidden


def down_packed(
    hidden: Activation, down: Packed, blocks: Blocks, weights_TK: Tensor, tile: Tile, awaited: int = 0
) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D].

    awaited: programs of `gate_up_packed`, the kernel before, for each block, if it does not wait for all.
    """
    total, int8, block_n = weights_TK.numel(), down.int8, fitting(tile.n, down.outputs)
    out_MD = torch.empty(total, down.outputs, dtype=torch.bfloat16, device=weights_TK.device)
    tokens = weights_TK.shape[0]
    early = launch(tokens) if tokens > WAITING_TOKENS else {}
    _down_packed[(down.outputs // block_n, blocks.experts_C.shape[0])](
        hidden.q_TD if int8 else hidden.x_TD, hidden.scales_TX, down.stored, down.scales, blocks.rows,
        blocks.experts_C, blocks.done_C, weights_TK, out_MD, total,
        OUTPUTS=down.outputs, GROUPS=down.groups, INPUTS=down.inputs, PIECE=hidden.piece,
        STRIDE=down.stride, ROW=down.row_stride, KIND=down.kind, TURN=_turn(down, tile), STAGES=tile.stages,
        AWAITED=awaited if early else 0,
        BLOCK_N=block_n, BLOCK_M=blocks.size, **tile.options, **early,
    )  # fmt: skip
    return out_MD


def experts_packed(
    x: Activation,
    gate_up: Packed,
    down: Packed,
    blocks: Blocks,
    weights_TK: Tensor,
    tiles: ExpertTiles,
) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D], to be summed over K; `blocks` are of tiles.rows.

    Rows that stand in no block (of expert -1, which is none) are not written.
    """
    rows, per_token = weights_TK.numel(), weights_TK.shape[1]
    hidden = gate_up_packed(x, gate_up, blocks, rows, per_token, tiles.gate_up, down.kind)
    awaited = hidden.x_TD.shape[1] // hidden.piece
    return down_packed(hidden, down, blocks, weights_TK, tiles.down, awaited)


def _turn(weight: Packed, tile: Tile) -> int:
    """Groups of an iteration: sparse ones are stored in pairs."""
    return 2 if isinstance(weight, PackedSparse14) else tile.turn


def fitting(wanted: int, outputs: int) -> int:
    """`wanted`, or 64 where `outputs` are no multiple of it."""
    return wanted if outputs % wanted == 0 else 64


def experts_bf16(
    x_TD: Tensor,
    gate_up_AFD: Tensor,
    down_ADI: Tensor,
    blocks: Blocks,
    weights_TK: Tensor,
    tiles: ExpertTiles,
) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D], to be summed over K; `blocks` are of tiles.rows.

    Rows that stand in no block (of expert -1, which is none) are not written.
    """
    tokens, per_token = weights_TK.shape
    total, inner, width, size = tokens * per_token, down_ADI.shape[2], x_TD.shape[1], blocks.size
    hidden_MI = torch.empty(total, inner, dtype=torch.bfloat16, device=x_TD.device)
    out_MD = torch.empty(total, width, dtype=torch.bfloat16, device=x_TD.device)
    count = blocks.experts_C.shape[0]
    up_n, down_n = fitting(tiles.gate_up.n, inner), fitting(tiles.down.n, width)
    _gate_up_bf16[(inner // up_n, count)](
        x_TD, gate_up_AFD, blocks.rows, blocks.experts_C, hidden_MI, total,
        PER_TOKEN=per_token, INNER=inner, WIDTH=width, BLOCK_N=up_n, BLOCK_M=size,
        BLOCK_K=128 if size < 64 and width % 128 == 0 else 64,
        **tiles.gate_up.options, **launch(tokens),
    )  # fmt: skip
    _down_bf16[(width // down_n, count)](
        hidden_MI, down_ADI, blocks.rows, blocks.experts_C, weights_TK, out_MD, total,
        OUTPUTS=width, INNER=inner, BLOCK_N=down_n, BLOCK_M=size,
        BLOCK_K=128 if size < 64 and inner % 128 == 0 else 64,
        **tiles.down.options, **launch(tokens),
    )  # fmt: skip
    return out_MD
