"""Tokens on their way to the experts of other ranks: packed for an exchange of fixed size, and unpacked.

Each rank reserves C rows for every other one, and T rows at the end for its own tokens, which stay. All
shapes are known before the routing is, so that CUDA graphs capture an exchange. Tokens that find no row are
not sent; `Slots.most` tells, and the pass is computed again with room for all.

Legend: T own tokens, K experts a token, E ranks, C rows for another rank, S = (E - 1) * C + T rows in all,
D hidden, X scales of a token, W words of 4 bytes in a row, A routed experts, H experts of this rank, N copies
of an expert at most.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton.norm import Activation, Added


@dataclass(frozen=True)
class Places:
    """Where the routed experts of a layer are: places int32 [A, N], copies int32 [A].

    Rank r has places r * each and on. own: this rank's number of `ranks`.
    """

    places_AN: Tensor
    copies_A: Tensor
    each: int
    own: int
    ranks: int

    @property
    def routed(self) -> int:
        """A."""
        return self.copies_A.shape[0]


class Slots(NamedTuple):
    """Rows of an exchange.

    source_S: int32, the token of each row, -1 for none. row_TE: int64, the row of each token for each rank;
    chosen_TE: int32, -1 where there is none. most: int32 [1], the largest number of tokens for another rank.
    """

    source_S: Tensor
    row_TE: Tensor
    chosen_TE: Tensor
    most: Tensor


@triton.jit
def _owner(experts, places, copies, token, at, mask, OWN, EACH, ROUTED: tl.constexpr, COPIES: tl.constexpr):
    """The rank of the expert at `at` for `token` (-1: none), and its number there."""
    expert = tl.load(experts + at, mask=mask, other=-1)
    routed = (expert >= 0) & (expert < ROUTED)
    count = tl.load(copies + expert, mask=routed, other=1)
    place = tl.load(places + expert * COPIES + token % count, mask=routed, other=0)
    owner = tl.where(routed, place // EACH, tl.where(expert >= ROUTED, OWN, -1))
    return owner, tl.where(routed, place % EACH, expert - ROUTED + EACH)


@triton.jit
def _needed(
    experts, places, copies, token, tokens, rank, OWN, EACH, ROUTED: tl.constexpr, COPIES: tl.constexpr,
    PER_TOKEN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """1 for each token that has an expert at `rank`, else 0."""
    needed = tl.zeros((CHUNK,), tl.int32)
    for k in tl.static_range(PER_TOKEN):
        owner, _ = _owner(
            experts, places, copies, token, token * PER_TOKEN + k, token < tokens, OWN, EACH, ROUTED, COPIES
        )
        needed = tl.where(owner == rank, 1, needed)
    return needed


@triton.jit(do_not_specialize=["tokens", "capacity", "width"])
def _assign(
    experts, weights, places, copies, payload, source, rows, chosen, most, counts, tokens, capacity, width,
    OWN: tl.constexpr, RANKS: tl.constexpr, EACH: tl.constexpr, ROUTED: tl.constexpr, COPIES: tl.constexpr,
    PER_TOKEN: tl.constexpr, HELD: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each program takes a chunk of tokens for one rank, behind the rows of those in the chunks before."""
    rank, chunk = tl.program_id(0), tl.program_id(1)
    if rank == 0 and chunk == 0:
        h = tl.arange(0, BLOCK_H)
        tl.store(counts + h, 0, mask=h < HELD)
    first = tl.where(rank == OWN, RANKS - 1, tl.where(rank < OWN, rank, rank - 1)) * capacity
    room = tl.where(rank == OWN, tokens, capacity)
    i = tl.arange(0, CHUNK)
    ids = width - 2 * PER_TOKEN
    found = 0
    for start in range(0, chunk * CHUNK, CHUNK):
        found += tl.sum(
            _needed(
                experts, places, copies, start + i, tokens, rank, OWN, EACH, ROUTED, COPIES, PER_TOKEN, CHUNK
            )
        )
    token = chunk * CHUNK + i
    there = token < tokens
    needed = _needed(
        experts, places, copies, token, tokens, rank, OWN, EACH, ROUTED, COPIES, PER_TOKEN, CHUNK
    )
    slot = found + tl.cumsum(needed, axis=0) - 1
    kept = (needed > 0) & (slot < room)
    tl.store(rows + token * RANKS + rank, (first + slot).to(tl.int64), mask=there)
    tl.store(chosen + token * RANKS + rank, tl.where(kept, 0, -1), mask=there)
    tl.store(source + first + slot, token, mask=kept)
    to = (first + slot).to(tl.int64) * width + ids
    for k in tl.static_range(PER_TOKEN):
        at = token * PER_TOKEN + k
        owner, local = _owner(experts, places, copies, token, at, there, OWN, EACH, ROUTED, COPIES)
        tl.store(payload + to + k, tl.where(owner == rank, local, -1), mask=kept)
        weight = tl.load(weights + at, mask=kept, other=0.0)
        tl.store(payload + to + PER_TOKEN + k, weight.to(tl.int32, bitcast=True), mask=kept)
    if chunk == tl.num_programs(1) - 1:
        found += tl.sum(needed)
        for start in range(found, room, CHUNK):
            slot = start + i
            empty = slot < room
            tl.store(source + first + slot, -1, mask=empty)
            to = (first + slot).to(tl.int64) * width + ids
            for k in tl.static_range(PER_TOKEN):
                tl.store(payload + to + k, -1, mask=empty)
        if rank != OWN:
            tl.atomic_max(most, found)


@triton.jit
def _pack(
    values, scales, payload, source, width, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    token = tl.load(source + slot).to(tl.int64)
    if token >= 0:
        w = tl.arange(0, BLOCK)
        word = tl.load(values + token * FIRST + w, mask=w < FIRST)
        tl.store(payload + slot * width + w, word, mask=w < FIRST)
        if SECOND > 0:
            x = tl.arange(0, BLOCK_X)
            word = tl.load(scales + token * SECOND + x, mask=x < SECOND)
            tl.store(payload + slot * width + FIRST + x, word, mask=x < SECOND)


@triton.jit(do_not_specialize=["away"])
def _unpack(
    received, kept, values, scales, experts, weights, counts, away, width,
    FIRST: tl.constexpr, SECOND: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row = received + slot * width
    if slot >= away:
        row = kept + slot * width
    k = tl.arange(0, BLOCK_K)
    mask_k = k < PER_TOKEN
    local = tl.load(row + width - 2 * PER_TOKEN + k, mask=mask_k, other=-1)
    weight = tl.load(row + width - PER_TOKEN + k, mask=mask_k, other=0)
    tl.store(experts + slot * PER_TOKEN + k, local, mask=mask_k)
    tl.store(weights + slot * PER_TOKEN + k, weight.to(tl.float32, bitcast=True), mask=mask_k)
    tl.atomic_add(counts + local, 1, mask=local >= 0)
    if tl.max(local, axis=0) >= 0:
        w = tl.arange(0, BLOCK)
        tl.store(values + slot * FIRST + w, tl.load(row + w, mask=w < FIRST), mask=w < FIRST)
        if SECOND > 0:
            x = tl.arange(0, BLOCK_X)
            word = tl.load(row + FIRST + x, mask=x < SECOND)
            tl.store(scales + slot * SECOND + x, word, mask=x < SECOND)


@triton.jit(do_not_specialize=["away"])
def _sum(
    rows, order, experts, sent, kept, away, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PER_TOKEN: tl.constexpr, ORDERED: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < WIDTH
    sums = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(PER_TOKEN):
        row = slot * PER_TOKEN + k
        there = mask
        if CHOSEN:
            there = mask & (tl.load(experts + row) >= 0)
        if ORDERED:
            row = tl.load(order + row)
        sums += tl.load(rows + row * WIDTH + d, mask=there, other=0.0).to(tl.float32)
    out = sent + slot * WIDTH
    if slot >= away:
        out = kept + slot * WIDTH
    tl.store(out + d, sums.to(tl.bfloat16), mask=mask)


def _words(x: Activation, rounded: bool) -> tuple[Tensor, Tensor, int, int]:
    """A token's activations as int32 [T, words]: values of a byte and scales, or bf16 values and none."""
    values = (x.q_TD if rounded else x.x_TD).view(torch.int32)
    scales = x.scales_TX.view(torch.int32)
    return values, scales, values.shape[1], scales.shape[1] if rounded else 0


def chunk_of(tokens: int) -> int:
    """Tokens of a program that assigns rows."""
    return 64 if tokens <= 64 else 512


def pack(
    x: Activation, rounded: bool, experts_TK: Tensor, weights_TK: Tensor, places: Places, capacity: int,
    counts_H: Tensor, most: Tensor,
) -> tuple[Tensor, Slots]:  # fmt: skip
    """int32 [S, W], what goes to each rank, `capacity` rows each; sets `counts_H` to zero.

    rounded: whether the int8 or e4m3 side of `x` goes there, with its scales, or the one in bf16.
    experts_TK: int32, -1 for none, shared experts behind the routed ones. most: int32 [1] of Slots; raised.
    """
    (tokens, per_token), device = experts_TK.shape, experts_TK.device
    values, scales, first, second = _words(x, rounded)
    width, size = first + second + 2 * per_token, (places.ranks - 1) * capacity + tokens
    payload = torch.empty(size, width, dtype=torch.int32, device=device)
    source_S = torch.empty(size, dtype=torch.int32, device=device)
    row_TE = torch.empty(tokens, places.ranks, dtype=torch.int64, device=device)
    chosen_TE = torch.empty(tokens, places.ranks, dtype=torch.int32, device=device)
    chunk = chunk_of(tokens)
    _assign[(places.ranks, triton.cdiv(tokens, chunk))](
        experts_TK, weights_TK, places.places_AN, places.copies_A, payload, source_S, row_TE, chosen_TE, most,
        counts_H, tokens, capacity, width,
        OWN=places.own, RANKS=places.ranks, EACH=places.each, ROUTED=places.routed,
        COPIES=places.places_AN.shape[1], PER_TOKEN=per_token, HELD=counts_H.shape[0],
        BLOCK_H=triton.next_power_of_2(counts_H.shape[0]), CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    _pack[(size,)](
        values, scales, payload, source_S, width, FIRST=first, SECOND=second,
        BLOCK=triton.next_power_of_2(first), BLOCK_X=triton.next_power_of_2(max(second, 1)), num_warps=4,
    )  # fmt: skip
    return payload, Slots(source_S, row_TE, chosen_TE, most)


def unpack(
    received: Tensor, kept: Tensor, away: int, like: Activation, rounded: bool, per_token: int,
    counts_H: Tensor,
) -> tuple[Activation, Tensor, Tensor]:  # fmt: skip
    """Activations of S rows, their experts int32 [S, K] and weights float32 [S, K]; adds to `counts_H`.

    The first `away` rows are those of other ranks, in `received`; the rest is in `kept`, at the same rows.
    Activations of a row without experts are not written.
    """
    size, width = kept.shape
    x = like.empty_like(size)
    values, scales, first, second = _words(x, rounded)
    experts_SK = torch.empty(size, per_token, dtype=torch.int32, device=kept.device)
    weights_SK = torch.empty(size, per_token, dtype=torch.float32, device=kept.device)
    _unpack[(size,)](
        received, kept, values, scales, experts_SK, weights_SK, counts_H, away, width,
        FIRST=first, SECOND=second, PER_TOKEN=per_token, BLOCK=triton.next_power_of_2(first),
        BLOCK_X=triton.next_power_of_2(max(second, 1)), BLOCK_K=triton.next_power_of_2(per_token),
        num_warps=4,
    )  # fmt: skip
    return x, experts_SK, weights_SK


def sum_rows(added: Added, away: int, sent: Tensor, kept: Tensor) -> None:
    """Sums each row's experts, bf16: the first `away` rows into `sent`, the others into `kept` [S, D]."""
    size, width = kept.shape
    _sum[(size,)](
        added.rows_MD, added.order_M, added.experts_M, sent, kept, away,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), PER_TOKEN=added.per_token(size),
        ORDERED=added.order_M is not None, CHOSEN=added.experts_M is not None, num_warps=4,
    )  # fmt: skip
