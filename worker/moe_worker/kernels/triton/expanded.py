"""Attention of prompts over keys and values that are expanded from latents, instead of absorbed queries.

A token of a prompt shares its context with many others. Expanding the context once then costs less than
comparing each token with latents, which are three times as wide as a head's keys. Where few programs read
long contexts, these are cut into KV splits, which another kernel merges.

Legend: T tokens, B sequences, C positions of all contexts one behind the other, H heads, N and P query
elements without and with rotary position, R latent rank, W = R + P, V value elements, K = H * N, O columns of
the expanded rows: keys [H, N], then values [H, V].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.triton.attention import TokenTiles
from moe_worker.kernels.triton.norm import Activation, Rounding, round_values
from moe_worker.kernels.triton.tiles import add_dot_bf16, dot_bf16, int8_scale, round_even


class Contexts(NamedTuple):
    """Contexts of a pass, and its tokens in tiles of BLOCK_T.

    rows_C: int64, rows of the cache. first_B: int32, where in C a sequence's context begins, and behind the
    last one where they all end.
    """

    rows_C: Tensor
    first_B: Tensor
    tiles: TokenTiles


@triton.jit
def _add_expanded(
    total, top, acc, q_plain, q_rope, position_q, keys, cache_rope, own_values, at, end, scale,
    PLAIN: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Adds positions `at` to `at` + BLOCK_S (exclusive) of a context to the running softmax.

    DIAGONAL: not all tokens see all of them. Values that are not finite then count as 0, since 0 times NaN is
    NaN for the tokens that do not see them; those that do have no finite score.
    """
    n, p, v, s = tl.arange(0, PLAIN), tl.arange(0, ROPE), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    row_s = at + s
    if DIAGONAL:
        row_s = tl.minimum(row_s, end - 1)
    row_s = row_s.to(tl.int64)
    k = tl.load(keys + row_s[:, None] * ROW + n[None, :])
    k_rope = tl.load(cache_rope + row_s[:, None] * WIDTH + p[None, :])
    from_v = own_values + row_s[:, None] * ROW + v[None, :]
    if BLOCK_V == VALUE:  # noqa: SIM108 - as in other kernels
        values = tl.load(from_v)
    else:
        values = tl.load(from_v, mask=(v < VALUE)[None, :], other=0.0)
    scores = add_dot_bf16(dot_bf16(q_plain, tl.trans(k)), q_rope, tl.trans(k_rope))
    scores *= scale * 1.4426950408889634
    if DIAGONAL:
        wide = values.to(tl.float32)
        # 0 for finite values, else NaN.
        scores += tl.sum(wide - wide, axis=1)[None, :]
        scores = tl.where(tl.abs(scores) < float("inf"), scores, float("nan"))
        values = tl.where(tl.abs(values) < float("inf"), values, 0.0)
        visible = (at + s < end)[None, :] & (at + s[None, :] <= position_q[:, None])
        scores = tl.where(visible, scores, -1e30)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = add_dot_bf16(acc * shrink[:, None], weights.to(tl.bfloat16), values)
    return total, new_top, acc


@triton.jit
def _store_values(
    y_MV, out, out_q, out_scale, token_M, mask_M, head,
    HEADS: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    PIECE: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Rounds a head's values, which are bf16, and stores them: [M, V]."""
    v = tl.arange(0, BLOCK_V)
    mask = mask_M[:, None] & (v < VALUE)[None, :]
    to = token_M[:, None] * (HEADS * VALUE) + head * VALUE + v[None, :]
    y = y_MV
    if ROUNDING > 0:
        PIECES: tl.constexpr = BLOCK_V // PIECE
        cut = tl.reshape(y.to(tl.float32), (BLOCK_M, PIECES, PIECE))
        scale_MX = int8_scale(cut, 2)
        steps = round_even(cut / scale_MX[:, :, None])
        if ROUNDING == 1:
            tl.store(out_q + to, tl.reshape(steps, (BLOCK_M, BLOCK_V)).to(tl.int8), mask=mask)
            x = tl.arange(0, PIECES)
            to_x = token_M[:, None] * (HEADS * VALUE // PIECE) + head * (VALUE // PIECE) + x[None, :]
            tl.store(out_scale + to_x, scale_MX, mask=mask_M[:, None] & (x < VALUE // PIECE)[None, :])
        else:
            y = tl.reshape(steps * scale_MX[:, :, None], (BLOCK_M, BLOCK_V)).to(tl.bfloat16)
    if ROUNDING != 1:
        tl.store(out + to, y, mask=mask)


@triton.jit(do_not_specialize=["query_stride"])
def _attend_expanded(
    query, query_stride, expanded, latents, positions, tile_sequence, tile_first, tile_count, firsts,
    out, out_q, out_scale, parts, lse, scale,
    HEADS: tl.constexpr, PLAIN: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PIECE: tl.constexpr,
    ROUNDING: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = RANK + ROPE
    ROW: tl.constexpr = HEADS * (PLAIN + VALUE)
    STEP: tl.constexpr = SPLITS * BLOCK_S
    # The last tiles of a prompt see most: they begin first.
    head, split, tile = tl.program_id(0), tl.program_id(1), tl.num_programs(2) - 1 - tl.program_id(2)
    first, count = tl.load(tile_first + tile), tl.load(tile_count + tile)
    if count == 0:
        return
    begin = tl.load(firsts + tl.load(tile_sequence + tile)).to(tl.int64)
    t, n, p = tl.arange(0, BLOCK_T), tl.arange(0, PLAIN), tl.arange(0, ROPE)
    mask_t = t < count
    token_t = (first + t).to(tl.int64)
    position_t = tl.load(positions + token_t, mask=mask_t, other=0)
    length = tl.load(positions + first + count - 1) + 1
    own = query + token_t[:, None] * query_stride + head * (PLAIN + ROPE)
    q_plain = tl.load(own + n[None, :], mask=mask_t[:, None], other=0.0)
    q_rope = tl.load(own + PLAIN + p[None, :], mask=mask_t[:, None], other=0.0)
    keys = expanded + begin * ROW + head * PLAIN
    cache_rope = latents + begin * WIDTH + RANK
    own_values = expanded + begin * ROW + HEADS * PLAIN + head * VALUE
    top = tl.full((BLOCK_T,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    # The first token of the tile sees all blocks before this one, and so do the others.
    diagonal = tl.minimum(length, (tl.load(positions + first) + 1) // BLOCK_S * BLOCK_S)
    # KV splits take blocks in rotation, so that the place of the first one does not depend on the length.
    start = split * BLOCK_S
    for at in range(start, diagonal, STEP):
        total, top, acc = _add_expanded(
            total, top, acc, q_plain, q_rope, position_t, keys, cache_rope, own_values, at, length, scale,
            PLAIN, ROPE, VALUE, WIDTH, ROW, BLOCK_V, BLOCK_S, False,
        )  # fmt: skip
    behind = start + tl.cdiv(tl.maximum(diagonal - start, 0), STEP) * STEP
    for at in range(behind, length, STEP):
        total, top, acc = _add_expanded(
            total, top, acc, q_plain, q_rope, position_t, keys, cache_rope, own_values, at, length, scale,
            PLAIN, ROPE, VALUE, WIDTH, ROW, BLOCK_V, BLOCK_S, True,
        )  # fmt: skip
    if SPLITS == 1:
        _store_values(
            (acc / total[:, None]).to(tl.bfloat16), out, out_q, out_scale, token_t, mask_t, head,
            HEADS, VALUE, BLOCK_T, BLOCK_V, PIECE, ROUNDING,
        )  # fmt: skip
    else:
        # A split may see nothing of the context.
        safe = tl.where(total == 0.0, 1.0, total)
        to = (token_t * HEADS + head) * SPLITS + split
        v = tl.arange(0, BLOCK_V)
        mask = mask_t[:, None] & (v < VALUE)[None, :]
        tl.store(parts + to[:, None] * VALUE + v[None, :], acc / safe[:, None], mask=mask)
        tl.store(lse + to, tl.where(total == 0.0, -1e30, top + tl.log2(safe)), mask=mask_t)


@triton.jit
def _merge_expanded(
    parts, lse, tile_first, tile_count, out, out_q, out_scale,
    HEADS: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr, PIECE: tl.constexpr, ROUNDING: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of a tile's BLOCK_T tokens in a program."""
    PARTS: tl.constexpr = BLOCK_T // BLOCK_M
    head, tile = tl.program_id(0), tl.program_id(1) // PARTS
    m = tl.program_id(1) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    first, count = tl.load(tile_first + tile), tl.load(tile_count + tile)
    if tl.program_id(1) % PARTS * BLOCK_M >= count:
        return
    mask_M, token_M = m < count, (first + m).to(tl.int64)
    v, every = tl.arange(0, BLOCK_V), tl.arange(0, SPLITS)[None, :]
    first_M = (token_M * HEADS + head) * SPLITS
    lse_MS = tl.load(lse + first_M[:, None] + every, mask=mask_M[:, None], other=0.0)
    top_M = tl.max(lse_MS, axis=1)
    total_M = tl.sum(tl.exp2(lse_MS - top_M[:, None]), axis=1)
    y_MV = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    mask = mask_M[:, None] & (v < VALUE)[None, :]
    for s in tl.static_range(SPLITS):
        share_M = tl.exp2(tl.load(lse + first_M + s, mask=mask_M, other=0.0) - top_M) / total_M
        part_MV = tl.load(parts + (first_M + s)[:, None] * VALUE + v[None, :], mask=mask, other=0.0)
        y_MV += part_MV * share_M[:, None]
    _store_values(
        y_MV.to(tl.bfloat16), out, out_q, out_scale, token_M, mask_M, head,
        HEADS, VALUE, BLOCK_M, BLOCK_V, PIECE, ROUNDING,
    )  # fmt: skip


class ExpandedTile(NamedTuple):
    """Positions of one iteration, warps, and iterations that are loaded ahead."""

    s: int
    warps: int
    stages: int


# Tokens of one program, and of one where prompts are long; how each is cut. On an H200 32 prompts of 512
# tokens take 247 and 267 us, one of 2,048 69 and 63, one of 16,384 3,624 and 2,734.
BLOCK_T, LONG_BLOCK_T, LONG = 64, 128, 2048
TILE, LONG_TILE = ExpandedTile(32, 4, 3), ExpandedTile(64, 8, 3)
# Tokens of one program of the merge.
MERGED_TOKENS = 16
# Programs that KV splits may make, about two for each multiprocessor of an H200; the most splits; positions
# that each has at least; and the shortest context with the most.
MOST_PROGRAMS, MOST_SPLITS, SPLIT_POSITIONS = 256, 8, 128
SPLIT_CONTEXT = MOST_SPLITS * SPLIT_POSITIONS


def expanded_tokens(counts: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of one program of a pass with so many tokens of sequences with contexts of these lengths."""
    return LONG_BLOCK_T if sum(counts) >= LONG and sum(lengths) >= LONG * len(lengths) else BLOCK_T


def expanded_splits(tokens: int, heads: int, positions: int) -> int:
    """KV splits of a pass that expands so many positions: more than one where its programs are few."""
    programs = heads * triton.cdiv(tokens, BLOCK_T)
    splits = min(MOST_SPLITS, MOST_PROGRAMS // programs, positions // SPLIT_POSITIONS)
    return 1 << (splits.bit_length() - 1) if splits else 1


@triton.jit(do_not_specialize=["page_stride", "sequences", "most", "nobody"])
def _context_rows(
    pages, page_stride, firsts, out, sequences, most, nobody,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence_c = tl.full((BLOCK,), -1, tl.int32)
    for start in range(0, sequences, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        first_B = tl.load(firsts + b, mask=b < sequences, other=2147483647)
        sequence_c += tl.sum((first_B[None, :] <= c[:, None]).to(tl.int32), axis=1)
    inside_c = c < tl.load(firsts + sequences)
    position_c = c - tl.load(firsts + sequence_c, mask=inside_c, other=0)
    from_c = pages + sequence_c.to(tl.int64) * page_stride + position_c // PAGE
    page_c = tl.load(from_c, mask=inside_c, other=0).to(tl.int64)
    tl.store(out + c, tl.where(inside_c, page_c * PAGE + position_c % PAGE, nobody), mask=c < most)


def context_rows(pages_BP: Tensor, first_B: Tensor, most: int, page: int, nobody: int) -> Tensor:
    """Rows of the cache of all contexts, int64 [most]; behind them the row `nobody`.

    first_B: see Contexts; its last entry is no sequence.
    """
    rows_C, block = torch.empty(most, dtype=torch.int64, device=pages_BP.device), 128
    _context_rows[(triton.cdiv(most, block),)](
        pages_BP, pages_BP.stride(0), first_B, rows_C, first_B.shape[0] - 1, most, nobody,
        PAGE=page, BLOCK=block, BLOCK_B=16, num_warps=4,
    )  # fmt: skip
    return rows_C


def spreads(out: Activation, heads: int, rounding: Rounding) -> bool:
    """Whether a scale of `out` is of the values of several heads, so that another launch rounds them."""
    return rounding is Rounding.E4M3 or out.x_TD.shape[1] // heads % out.piece != 0


def expanding_weights(key_HNR: Tensor, value_HRV: Tensor) -> Tensor:
    """What `expand` multiplies latents by, [O, R]; its first rows are those of `key_HNR`."""
    return torch.cat((key_HNR.flatten(0, 1), value_HRV.transpose(1, 2).flatten(0, 1)))


def expand(cache_SW: Tensor, rows_C: Tensor, weights_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values bf16 [C, O] of the cache's rows, and these rows themselves, bf16 [C, W]."""
    # torch may index e4m3 only as bytes.
    stored_SW = cache_SW.view(torch.uint8) if cache_SW.itemsize == 1 else cache_SW
    latents_CW = stored_SW.index_select(0, rows_C).view(cache_SW.dtype).to(torch.bfloat16)
    return functional.linear(latents_CW[:, : weights_OR.shape[1]], weights_OR), latents_CW


def attend_expanded(
    query_TO: Tensor, expanded_CO: Tensor, latents_CW: Tensor, positions_T: Tensor, contexts: Contexts,
    plain: int, rank: int, scale: float, out: Activation, rounding: Rounding, splits: int | None = None,
    cut: ExpandedTile | None = None,
) -> None:  # fmt: skip
    """Writes attention's values, [T, H * V]. Another launch rounds where a scale is of several heads.

    query_TO: bf16 [T, H * (N + P)], rotated; rows may have any stride. plain: N. splits: of the contexts, as
    many as suit the pass for None.
    """
    rope = latents_CW.shape[1] - rank
    heads = query_TO.shape[1] // (plain + rope)
    value = expanded_CO.shape[1] // heads - plain
    rounded = Rounding.NONE if spreads(out, heads, rounding) else rounding
    tokens, tiles, block_v = query_TO.shape[0], contexts.tiles, triton.next_power_of_2(value)
    parts = lse = None
    long = tiles.most > BLOCK_T
    cut = cut or (LONG_TILE if long else TILE)
    if splits is None:
        splits = 1 if long else expanded_splits(tokens, heads, expanded_CO.shape[0])
    if splits > 1:
        parts = torch.empty(tokens, heads, splits, value, dtype=torch.float32, device=query_TO.device)
        lse = torch.empty(tokens, heads, splits, dtype=torch.float32, device=query_TO.device)
    _attend_expanded[(heads, splits, tiles.first_C.shape[0])](
        query_TO, query_TO.stride(0), expanded_CO, latents_CW, positions_T, tiles.sequence_C,
        tiles.first_C, tiles.count_C, contexts.first_B, out.x_TD, out.q_TD, out.scales_TX, parts, lse,
        scale, HEADS=heads, PLAIN=plain, ROPE=rope, RANK=rank, VALUE=value,
        BLOCK_V=block_v, BLOCK_T=tiles.most, BLOCK_S=cut.s, PIECE=out.piece,
        ROUNDING=rounded.value, SPLITS=splits, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if splits > 1:
        block_m = min(MERGED_TOKENS, tiles.most)
        _merge_expanded[(heads, tiles.first_C.shape[0] * (tiles.most // block_m))](
            parts, lse, tiles.first_C, tiles.count_C, out.x_TD, out.q_TD, out.scales_TX,
            HEADS=heads, VALUE=value, BLOCK_V=block_v, BLOCK_T=tiles.most, BLOCK_M=block_m,
            PIECE=out.piece, ROUNDING=rounded.value, SPLITS=splits, num_warps=4,
        )  # fmt: skip
    if rounded is not rounding:
        round_values(out, rounding)
