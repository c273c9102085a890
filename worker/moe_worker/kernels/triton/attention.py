"""Attention over the paged latent cache, cut along the context, and the merge that expands the values.

A program takes the heads of up to BLOCK_T tokens of one sequence, so that one kernel serves decode (one
token) and prefill (several), and reads one KV split; each token sees positions up to its own.

Legend: T tokens, H heads, R latent rank, P rotary elements, W = R + P, V value elements of a head, S KV
splits, C tiles of tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.launch import launch, wait_for_inputs
from moe_worker.kernels.triton.norm import Activation, Rounding, round_values
from moe_worker.kernels.triton.tiles import add_dot_bf16, dot_bf16, int8_scale, round_even
from moe_worker.quant.int8 import piece_of


class TokenTiles(NamedTuple):
    """Which tokens go together: int32 sequence, first token and number of tokens of each tile; its most.

    Where the most is 1, tile i is token i, the only one of sequence i; else a tile may have no tokens.
    """

    sequence_C: Tensor
    first_C: Tensor
    count_C: Tensor
    most: int


@triton.jit
def _cache_rows(own_pages, at, end, PAGE: tl.constexpr, BLOCK_S: tl.constexpr):
    """Rows of the cache of positions `at` to `at` + BLOCK_S; behind `end` (exclusive) the last one's."""
    position_s = tl.minimum(at + tl.arange(0, BLOCK_S), end - 1)
    return tl.load(own_pages + position_s // PAGE).to(tl.int64) * PAGE + position_s % PAGE


@triton.jit
def _load_parts(base, row_m, mask_m, RANK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The first RANK values of the rows `row_m` in bf16, as a tuple of tensors [M, CHUNK].

    An 8-bit cache becomes bf16 here; a bf16 one is as it is. mask_m: which rows exist; None: all.
    """
    c, parts = tl.arange(0, CHUNK), ()
    for i in tl.static_range(RANK // CHUNK):
        where = base + row_m[:, None] * WIDTH + (i * CHUNK + c)[None, :]
        if mask_m is None:  # noqa: SIM108 - no tensor
            part = tl.load(where)
        else:
            part = tl.load(where, mask=mask_m[:, None], other=0.0)
        parts = parts + (part.to(tl.bfloat16),)  # type: ignore[assignment]  # noqa: RUF005
    return parts


@triton.jit
def _no_weights(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What `_add_weights` adds to. With columns, one for each position of a block, warps need not exchange
    their sums, which takes barriers, before `_all_weights`.
    """
    if COLUMNS > 0:  # noqa: SIM108 - as in other kernels
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        total = tl.zeros((ROWS,), tl.float32)
    return total


@triton.jit
def _add_weights(total, shrink, weights):
    if len(total.shape) == 2:
        total = total * shrink[:, None] + weights
    else:
        total = total * shrink + tl.sum(weights, axis=1)
    return total


@triton.jit
def _all_weights(total):
    if len(total.shape) == 2:
        total = tl.sum(total, axis=1)
    return total


@triton.jit
def _add_block(
    total, top, acc, q_parts, q_rope, position_q, cache, row_s, at, end, scale,
    RANK: tl.constexpr, ROPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Adds cached positions `at` to `at` + BLOCK_S (exclusive, as `end` is) to the running softmax.

    acc, q_parts: tuples of [Q, CHUNK], so that their products do not wait for each other. DIAGONAL: not all
    tokens see all of them. A weight of 0 times NaN is NaN, so that a row that is not finite
    would reach the tokens before it, whose pages other requests share: it counts as 0, and those that see it
    have no finite score.
    """
    WIDTH: tl.constexpr = RANK + ROPE
    s = tl.arange(0, BLOCK_S)
    k_parts = _load_parts(cache, row_s, None, RANK, WIDTH, CHUNK)
    k_rope = tl.load(cache + row_s[:, None] * WIDTH + RANK + tl.arange(0, ROPE)[None, :]).to(tl.bfloat16)
    scores = dot_bf16(q_rope, tl.trans(k_rope))
    for i in tl.static_range(RANK // CHUNK):
        scores += dot_bf16(q_parts[i], tl.trans(k_parts[i]))
    scores *= scale * 1.4426950408889634
    if DIAGONAL:
        scores = tl.where(tl.abs(scores) < float("inf"), scores, float("nan"))
    visible = (at + s < end)[None, :] & (at + s[None, :] <= position_q[:, None])
    scores = tl.where(visible, scores, -1e30)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.where(visible, tl.exp2(scores - new_top[:, None]), 0.0)
    shrink = tl.exp2(top - new_top)
    total = _add_weights(total, shrink, weights)
    out = ()
    for i in tl.static_range(RANK // CHUNK):
        k = k_parts[i]
        if DIAGONAL:
            k = tl.where(tl.abs(k) < float("inf"), k, 0.0)
        part = add_dot_bf16(acc[i] * shrink[:, None], weights.to(tl.bfloat16), k)
        out = out + (part,)  # type: ignore[assignment]  # noqa: RUF005
    return total, new_top, out


@triton.jit(do_not_specialize=["page_stride"])
def _attend(
    query, cache, pages, positions, tile_sequence, tile_first, tile_count, out, out_lse, scale, page_stride,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = RANK + ROPE
    tile, part = tl.program_id(0), tl.program_id(1)
    own_pages, first, count = pages + tile * page_stride, tile, 1
    if BLOCK_T > 1:
        own_pages = pages + tl.load(tile_sequence + tile) * page_stride
        first, count = tl.load(tile_first + tile), tl.load(tile_count + tile)
    q = tl.arange(0, BLOCK_T * BLOCK_H)
    token_q, head_q = q // BLOCK_H, tl.program_id(2) * BLOCK_H + q % BLOCK_H
    mask_q = (token_q < count) & (head_q < HEADS)
    row_q = ((first + token_q) * HEADS + head_q).to(tl.int64)
    position_q = tl.load(positions + first + token_q, mask=mask_q, other=0)
    last = positions + first + count - 1
    if BLOCK_T > 1:  # noqa: SIM108 - as in other kernels
        length = tl.load(last, mask=count > 0, other=-1) + 1
    else:
        length = tl.load(last) + 1
    p = tl.arange(0, ROPE)
    # KV splits take blocks in rotation, so that the place of the first one does not depend on the length.
    STEP: tl.constexpr = SLICES * BLOCK_S
    start, diagonal = part * BLOCK_S, length
    if BLOCK_T > 1:
        # The first token of the tile sees all blocks before this one, and so do the others.
        diagonal = tl.minimum(length, (tl.load(positions + first) + 1) // BLOCK_S * BLOCK_S)
    # Rows are looked up an iteration ahead: Triton loads ahead only from places that it knows already.
    row_s = _cache_rows(own_pages, start, length, PAGE, BLOCK_S)
    wait_for_inputs()
    q_parts = _load_parts(query, row_q, mask_q, RANK, WIDTH, CHUNK)
    q_rope = tl.load(query + row_q[:, None] * WIDTH + RANK + p[None, :], mask=mask_q[:, None], other=0.0)
    top = tl.full((BLOCK_T * BLOCK_H,), -1e30, tl.float32)
    # With several KV splits, columns made a decode step 0.2 to 0.9 % slower.
    total = _no_weights(BLOCK_T * BLOCK_H, BLOCK_S if SLICES == 1 and BLOCK_T * BLOCK_H <= 16 else 0)
    acc = ()
    for _ in tl.static_range(RANK // CHUNK):
        acc = acc + (tl.zeros((BLOCK_T * BLOCK_H, CHUNK), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for at in range(start, diagonal, STEP):
        next_s = _cache_rows(own_pages, at + STEP, length, PAGE, BLOCK_S)
        total, top, acc = _add_block(
            total, top, acc, q_parts, q_rope, position_q, cache, row_s, at, length, scale,
            RANK, ROPE, CHUNK, BLOCK_S, False,
        )  # fmt: skip
        row_s = next_s
    if BLOCK_T > 1:
        behind = start + tl.cdiv(tl.maximum(diagonal - start, 0), STEP) * STEP
        for at in range(behind, length, STEP):
            row_s = _cache_rows(own_pages, at, length, PAGE, BLOCK_S)
            total, top, acc = _add_block(
                total, top, acc, q_parts, q_rope, position_q, cache, row_s, at, length, scale,
                RANK, ROPE, CHUNK, BLOCK_S, True,
            )  # fmt: skip
    total = _all_weights(total)
    safe = tl.where(total > 0.0, total, 1.0)
    lse = tl.where(total > 0.0, top + tl.log2(safe), -1e30)
    to = row_q * SLICES + part
    for i in tl.static_range(RANK // CHUNK):
        where = out + to[:, None] * RANK + (i * CHUNK + tl.arange(0, CHUNK))[None, :]
        tl.store(where, (acc[i] / safe[:, None]).to(out.dtype.element_ty), mask=mask_q[:, None])
    tl.store(out_lse + to, lse, mask=mask_q)


class AttentionTile(NamedTuple):
    """How attention is cut: positions of one iteration, warps, and iterations that are loaded ahead."""

    s: int
    warps: int
    stages: int


def attention_tile(tokens: int, rows: int) -> AttentionTile:
    """How programs of `rows` rows are cut, in a pass of `tokens` tokens; measured as other tiles are."""
    del tokens
    return AttentionTile(32, 4, 3) if rows <= 16 else AttentionTile(32, 8, 2)


# Rows (tokens times heads) of one program: their sums over 512 latents are what registers hold.
MOST_ROWS = 64


def attend(
    query_THW: Tensor, cache_SW: Tensor, pages_BP: Tensor, positions_T: Tensor, tiles: TokenTiles,
    rank: int, page: int, scale: float, slices: int, cut: AttentionTile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weighted latents of each KV split, [T, H, S, R], and the base-2 logarithms of their weights, [T, H, S].

    bf16 if there is one split, else float32. `cache_SW` is bf16 or float8_e4m3fn.
    """
    tokens, heads, width = query_THW.shape
    dtype = torch.bfloat16 if slices == 1 else torch.float32
    out_THSR = torch.empty(tokens, heads, slices, rank, dtype=dtype, device=query_THW.device)
    lse_THS = torch.empty(tokens, heads, slices, dtype=torch.float32, device=query_THW.device)
    block_h = min(triton.next_power_of_2(heads), MOST_ROWS // tiles.most)
    rows = tiles.most * block_h
    cut = cut or attention_tile(tokens, rows)
    _attend[(tiles.first_C.shape[0], slices, triton.cdiv(heads, block_h))](
        query_THW, cache_SW, pages_BP, positions_T, tiles.sequence_C, tiles.first_C, tiles.count_C,
        out_THSR, lse_THS, scale, pages_BP.stride(0),
        HEADS=heads, RANK=rank, ROPE=width - rank, PAGE=page, SLICES=slices, BLOCK_T=tiles.most,
        BLOCK_H=block_h, BLOCK_S=cut.s, CHUNK=min(128, rank) if rows <= 16 else rank,
        num_warps=cut.warps, num_stages=cut.stages, **launch(tokens),
    )  # fmt: skip
    return out_THSR, lse_THS


@triton.jit(do_not_specialize=["tokens"])
def _merge(
    parts, lse, value, out, out_q, out_scale, tokens,
    HEADS: tl.constexpr, RANK: tl.constexpr, VALUE: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
    TAKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """TAKEN: tokens of a program; a product has BLOCK_M rows at least. WIDTH: values of a head that are no
    padding.
    """
    m = tl.arange(0, BLOCK_M)
    token_M = (tl.program_id(0) * TAKEN + m).to(tl.int64)
    head = tl.program_id(1)
    wait_for_inputs()
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_M = (m < TAKEN) & (token_M < tokens)
    first_M = (token_M * HEADS + head) * SLICES
    every = tl.arange(0, SLICES)[None, :]
    lse_MS = tl.load(lse + first_M[:, None] + every, mask=mask_M[:, None], other=0.0)
    top_M = tl.max(lse_MS, axis=1)
    total_M = tl.sum(tl.exp2(lse_MS - top_M[:, None]), axis=1)
    acc_MV = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for begin in range(0, RANK, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        if SLICES == 1:
            # As they are, so that Triton loads them ahead.
            latent_MR = tl.load(parts + first_M[:, None] * RANK + r[None, :], mask=mask_M[:, None], other=0.0)
        else:
            latent_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for s in tl.static_range(SLICES):
                share_M = tl.exp2(tl.load(lse + first_M + s, mask=mask_M, other=0.0) - top_M) / total_M
                from_R = parts + (first_M + s)[:, None] * RANK + r[None, :]
                latent_MR += tl.load(from_R, mask=mask_M[:, None], other=0.0) * share_M[:, None]
        w = tl.load(value + (head * RANK + r[:, None]) * VALUE + v[None, :])
        acc_MV = add_dot_bf16(acc_MV, latent_MR.to(tl.bfloat16), w)
    to = token_M[:, None] * (HEADS * WIDTH) + head * WIDTH + v[None, :]
    mask = mask_M[:, None]
    if WIDTH < VALUE:
        mask = mask & (v < WIDTH)[None, :]
    y = acc_MV.to(tl.bfloat16)
    if ROUNDING > 0:
        y32 = y.to(tl.float32)
        scale_M = int8_scale(y32, 1)
        steps = round_even(y32 / scale_M[:, None])
        if ROUNDING == 1:
            tl.store(out_q + to, steps.to(tl.int8), mask=mask)
            x_piece = (head * VALUE) // BLOCK_V + tl.program_id(2)
            tl.store(out_scale + token_M * (HEADS * VALUE // BLOCK_V) + x_piece, scale_M, mask=mask_M)
        else:
            y = (steps * scale_M[:, None]).to(tl.bfloat16)
    if ROUNDING != 1:
        tl.store(out + to, y, mask=mask)


@triton.jit
def _merge_few(
    parts, lse, value, out, out_q, out_scale,
    HEADS: tl.constexpr, RANK: tl.constexpr, VALUE: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_V: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """As `_merge`, with a token and head a program: all it reads is loaded at once, weights early."""
    token, head = tl.program_id(0), tl.program_id(1)
    r, s = tl.arange(0, RANK), tl.arange(0, SLICES)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    w_RV = tl.load(value + (head * RANK + r[:, None]) * VALUE + v[None, :])
    wait_for_inputs()
    first = (token * HEADS + head) * SLICES
    lse_S = tl.load(lse + first + s)
    parts_SR = tl.load(parts + (first + s)[:, None] * RANK + r[None, :]).to(tl.float32)
    share_S = tl.exp2(lse_S - tl.max(lse_S, axis=0))
    latent_R = tl.sum(parts_SR * (share_S / tl.sum(share_S, axis=0))[:, None], axis=0)
    latent_R = latent_R.to(tl.bfloat16).to(tl.float32)
    y = tl.sum(latent_R[:, None] * w_RV.to(tl.float32), axis=0).to(tl.bfloat16)
    to = token * (HEADS * WIDTH) + head * WIDTH + v
    if ROUNDING > 0:
        y32 = y.to(tl.float32)
        scale = int8_scale(y32, 0)
        steps = round_even(y32 / scale)
        if ROUNDING == 1:
            tl.store(out_q + to, steps.to(tl.int8))
            x_piece = (head * VALUE) // BLOCK_V + tl.program_id(2)
            tl.store(out_scale + token * (HEADS * VALUE // BLOCK_V) + x_piece, scale)
        else:
            y = (steps * scale).to(tl.bfloat16)
    if WIDTH < VALUE:
        tl.store(out + to, y, mask=v < WIDTH)
    elif ROUNDING != 1:
        tl.store(out + to, y)


# Tokens up to which a program takes one token and head, and the values that it takes if it does not round.
FEW_TOKENS = 4
FEW_VALUES = 32
# Programs that a merge of more tokens has at least: about one for each multiprocessor of an H200.
MERGES = 128


def merged_tokens(tokens: int, heads: int) -> int:
    """Tokens of one program, a power of two from 2 to 16: so that there are MERGES programs if possible."""
    wanted: int = triton.next_power_of_2(tokens * heads // MERGES)
    return max(2, min(16, wanted))


def merge_values(
    parts_THSR: Tensor, lse_THS: Tensor, value_HRV: Tensor, out: Activation, rounding: Rounding
) -> None:
    """Merges the KV splits and expands latents to values: [T, H * V].

    `value_HRV` may be padded behind V. Where a scale of `out` is of several heads, another launch rounds.
    """
    if rounding is Rounding.E4M3 or out.x_TD.shape[1] < value_HRV.shape[0] * value_HRV.shape[2]:
        _merge_values(parts_THSR, lse_THS, value_HRV, out, Rounding.NONE)
        round_values(out, rounding)
    else:
        _merge_values(parts_THSR, lse_THS, value_HRV, out, rounding)


def _merge_values(
    parts_THSR: Tensor, lse_THS: Tensor, value_HRV: Tensor, out: Activation, rounding: Rounding
) -> None:
    tokens, heads, slices, rank = parts_THSR.shape
    value, width = value_HRV.shape[2], out.x_TD.shape[1] // heads
    block_v = piece_of(value)
    if tokens <= FEW_TOKENS:
        # Nothing is shared by the values of a piece that are not rounded: more programs take fewer.
        block_v = FEW_VALUES if rounding is Rounding.NONE else block_v
        _merge_few[(tokens, heads, value // block_v)](
            parts_THSR, lse_THS, value_HRV, out.x_TD, out.q_TD, out.scales_TX,
            HEADS=heads, RANK=rank, VALUE=value, WIDTH=width, SLICES=slices, BLOCK_V=block_v,
            ROUNDING=rounding.value,
            num_warps=16 if rank * block_v >= 65536 else 4, **launch(tokens),
        )  # fmt: skip
        return
    few, many = tokens <= 256, slices > 4
    taken = merged_tokens(tokens, heads) if few else 64
    _merge[(triton.cdiv(tokens, taken), heads, value // block_v)](
        parts_THSR, lse_THS, value_HRV, out.x_TD, out.q_TD, out.scales_TX, tokens,
        HEADS=heads, RANK=rank, VALUE=value, WIDTH=width, SLICES=slices, TAKEN=taken,
        BLOCK_M=16 if few else 64, BLOCK_R=min(64 if few and not many else 128, rank), BLOCK_V=block_v,
        ROUNDING=rounding.value,
        # Pipelining holds the parts of all splits in shared memory.
        num_warps=8 if many else 4, num_stages=1 if many else 3,
    )  # fmt: skip
