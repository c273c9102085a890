"""From the joint projection to what attention reads: cache rows, and rotated queries, absorbed or not.

Absorbed queries are in the space of cache rows.

Legend: T tokens, H heads, N query elements without and P with rotary position, R latent rank, W = R + P.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.launch import launch, wait_for_inputs
from moe_worker.kernels.triton.tiles import dot_bf16


class LatentWeights(NamedTuple):
    """What the kernel needs of one layer: bf16 [R], [H, N, R].

    rank: of the R latents the first so many count; those behind are padding, and zero.
    """

    norm_R: Tensor
    key_HNR: Tensor
    eps: float
    rank: int


@triton.jit
def _pairs(values_MP):
    """The first and the second values of all pairs: [M, P / 2] each."""
    return tl.split(tl.reshape(values_MP, (values_MP.shape[0], values_MP.shape[1] // 2, 2)))


@triton.jit
def _turn(source, target, stride_in, stride_out, token_M, mask_M, position_M, table, HALF: tl.constexpr):
    """Rotates interleaved pairs of rows of 2 * HALF elements."""
    p = tl.arange(0, 2 * HALF)[None, :]
    x = tl.load(source + token_M[:, None] * stride_in + p, mask=mask_M[:, None], other=0.0).to(tl.float32)
    a, b = _pairs(x)
    cos, sin = _pairs(tl.load(table + position_M[:, None] * (2 * HALF) + p))
    turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), x.shape)
    tl.store(target + stride_out[:, None] + p, turned.to(target.dtype.element_ty), mask=mask_M[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _latent(
    query, query_stride, latent, latent_stride, norm, key, table, positions, rows, cache, out, tokens, eps,
    HEADS: tl.constexpr, PLAIN: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, COUNTED: tl.constexpr,
    ABSORBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = RANK + ROPE
    # Rows of the cache come first, since they take longest: whole rows are needed for their norm, few at a
    # time, since registers hold them.
    row_blocks = tl.cdiv(tokens, 16)
    own_block = tl.program_id(0)
    if own_block < row_blocks:
        token_m = own_block * 16 + tl.arange(0, 16)
        mask_m = token_m < tokens
        token_m = token_m.to(tl.int64)
        r = tl.arange(0, RANK)
        weight_r = tl.load(norm + r).to(tl.float32)
        position_m = tl.load(positions + token_m, mask=mask_m, other=0)
        row_m = tl.load(rows + token_m, mask=mask_m, other=0) * WIDTH
        wait_for_inputs()
        from_m = latent + token_m[:, None] * latent_stride
        x = tl.load(from_m + r[None, :], mask=mask_m[:, None], other=0.0).to(tl.float32)
        normed = (x * tl.rsqrt(tl.sum(x * x, axis=1) / COUNTED + eps)[:, None]).to(tl.bfloat16)
        y = (normed.to(tl.float32) * weight_r[None, :]).to(tl.bfloat16)
        tl.store(cache + row_m[:, None] + r[None, :], y.to(cache.dtype.element_ty), mask=mask_m[:, None])
        _turn(
            latent + RANK, cache + RANK, latent_stride, row_m, token_m, mask_m, position_m, table,
            ROPE // 2,
        )  # fmt: skip
        return
    PARTS: tl.constexpr = HEADS * (RANK // BLOCK_R) if ABSORBED else HEADS
    part = (own_block - row_blocks) % PARTS
    token_M = (own_block - row_blocks) // PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_M = token_M < tokens
    token_M = token_M.to(tl.int64)
    if not ABSORBED:
        # Pairs of one head turn where they are.
        own = query + part * (PLAIN + ROPE) + PLAIN
        wait_for_inputs()
        position_M = tl.load(positions + token_M, mask=mask_M, other=0)
        _turn(own, own, query_stride, token_M * query_stride, token_M, mask_M, position_M, table, ROPE // 2)
    else:
        head, block = part // (RANK // BLOCK_R), part % (RANK // BLOCK_R)
        n, own_r = tl.arange(0, PLAIN), block * BLOCK_R + tl.arange(0, BLOCK_R)
        own = query + head * (PLAIN + ROPE)
        w = tl.load(key + (head * PLAIN + n[:, None]) * RANK + own_r[None, :])
        wait_for_inputs()
        plain = tl.load(own + token_M[:, None] * query_stride + n[None, :], mask=mask_M[:, None], other=0.0)
        to = (token_M * HEADS + head) * WIDTH
        absorbed = dot_bf16(plain, w).to(tl.bfloat16)
        tl.store(out + to[:, None] + own_r[None, :], absorbed, mask=mask_M[:, None])
        if block == 0:
            position_M = tl.load(positions + token_M, mask=mask_M, other=0)
            _turn(own + PLAIN, out + RANK, query_stride, to, token_M, mask_M, position_M, table, ROPE // 2)


def write_latents(
    query_TO: Tensor, latent_TW: Tensor, weights: LatentWeights, table_CP2: Tensor,
    positions_T: Tensor, rows_T: Tensor, cache_SW: Tensor, out_THW: Tensor | None,
) -> None:  # fmt: skip
    """Writes normed and rotated latents to rows of the cache, and absorbed, rotated queries to `out_THW`.

    With none, queries are rotated where they are, in `query_TO`.
    `table_CP2` is the rotation table as float32 [C, P / 2, 2]; rows of both inputs may have any stride.
    """
    heads, plain, rank = weights.key_HNR.shape
    tokens, rope = latent_TW.shape[0], latent_TW.shape[1] - rank
    # Of rows that are only rotated, 16 fit a program.
    block_m, block_r = 16, min(128, rank)
    if out_THW is not None and tokens > 16:
        block_m = 32 if tokens <= 256 else 128
    parts = heads if out_THW is None else heads * (rank // block_r)
    grid = (triton.cdiv(tokens, 16) + triton.cdiv(tokens, block_m) * parts,)
    _latent[grid](
        query_TO, query_TO.stride(0), latent_TW, latent_TW.stride(0), weights.norm_R, weights.key_HNR,
        table_CP2, positions_T, rows_T, cache_SW, out_THW, tokens, weights.eps,
        HEADS=heads, PLAIN=plain, ROPE=rope, RANK=rank, COUNTED=weights.rank,
        ABSORBED=out_THW is not None, BLOCK_M=block_m, BLOCK_R=block_r,
        num_warps=8 if block_m == 128 else 4, **launch(tokens),
    )  # fmt: skip
