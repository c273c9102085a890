"""Each Triton kernel against plain float64 torch, on inputs drawn anew.

One command on a bare machine with a GPU, torch, triton, transformers, safetensors and pytest:
    PYTHONPATH=worker:protos:. python -m pytest --noconftest -p no:cacheprovider tests/gpu
Without a GPU Triton interprets the kernels (TRITON_INTERPRET=1): tests/worker/test_interpreted.py.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from moe_worker.config.moe import Level, Routing
from moe_worker.kernels.triton import (
    attention,
    e4m3,
    expanded,
    experts,
    few,
    greedy,
    latent,
    linear,
    norm,
    packed,
    products,
    router,
    sparse14,
    wide,
)
from moe_worker.models import cuda
from moe_worker.models.cuda_build import pack_fp8, pack_int4, pack_sparse, split_dense
from moe_worker.moe.router import choose
from moe_worker.quant.fp8 import E4M3, Fp8Weight, quantize_fp8
from moe_worker.quant.int4 import quantize_int4
from moe_worker.quant.int8 import piece_of
from moe_worker.quant.matrix import Dense, stack
from tests.compress.sparse import random_sparse
from tests.gpu.device import BF16, DEVICE, INTERPRETED, multiply_in_e4m3, needs_device

pytestmark = needs_device
NONE, INT8, EMULATED, IN_E4M3, BY_POSITION = norm.Rounding
# The error of values in e4m3, which keep 4 bits: 1/16 at most, less in the root mean square.
FP8 = 0.035
ROUNDED = {NONE: 0.01, INT8: 0.015, EMULATED: 0.015, IN_E4M3: FP8}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(torch.seed() % 1000)


def randn(*sizes, dtype=torch.bfloat16):
    return torch.randn(*sizes, device=DEVICE).to(dtype)


def difference(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def poisoned(tokens, width, piece=0, rounding=INT8):
    out = norm.Activation.empty_for(rounding, tokens, width, DEVICE, piece)
    for tensor in (out.x_TD, out.scales_TX):
        tensor.fill_(math.nan)
    out.q_TD.view(torch.int8).fill_(77)
    return out


def rounded_side(x):
    return (x.q_TD.double().unflatten(1, (-1, x.piece)) * x.scales_TX.double().unsqueeze(-1)).flatten(1)


def packed_and_plain(weight, kind):
    """What the kernels read of rounded weights [..., O, I], and what they stand for, float64."""
    if kind != "fp8":
        int4 = quantize_int4(weight)
        return pack_int4(int4, kind == "w4a8"), int4.dequantize().double()
    rounded = quantize_fp8(weight) if weight.dim() == 2 else stack([quantize_fp8(each) for each in weight])
    return pack_fp8(rounded), rounded.dequantize().double()


def quantized(x_TI, rounding=INT8):
    """An activation whose rounded side is made by the norm kernel with a residual of unit rows."""
    out = poisoned(*x_TI.shape, rounding=rounding)
    ones = torch.ones(x_TI.shape[1], device=DEVICE, dtype=torch.bfloat16)
    norm.residual_norm(x_TI, None, ones, 1e-6, out, rounding)
    return out


@pytest.mark.parametrize(("tokens", "width", "summed"), [(1, 2048, 8), (5, 256, 1), (33, 192, 3)])
def test_residual_norm(tokens, width, summed):
    residual, added, weight = randn(tokens, width), randn(tokens * summed, width), randn(width)
    total = residual.double() + added.double().view(tokens, summed, width).sum(1)
    expected = total * torch.rsqrt(total.pow(2).mean(1, keepdim=True) + 1e-6) * weight.double()
    out = poisoned(tokens, width)
    norm.residual_norm(residual, norm.Added(added), weight, 1e-6, out, INT8)
    assert difference(residual, total) < BF16
    assert difference(out.x_TD, expected) < BF16
    top = out.x_TD.double().unflatten(1, (-1, out.piece)).abs().amax(-1, keepdim=True)
    error = (rounded_side(out) - out.x_TD.double()).abs().unflatten(1, (-1, out.piece))
    assert (error <= top / 254 * 1.0001).all()


def test_rows_to_be_added_may_stand_in_any_order():
    residual, added, order = randn(7, 128), randn(21, 128), torch.randperm(21, device=DEVICE)
    kept, ordered = residual.clone(), torch.empty_like(added).index_copy_(0, order, added)
    outs = poisoned(7, 128), poisoned(7, 128)
    ones = torch.ones(128, device=DEVICE, dtype=torch.bfloat16)
    norm.residual_norm(residual, norm.Added(added), ones, 1e-6, outs[0], NONE)
    norm.residual_norm(kept, norm.Added(ordered, order), ones, 1e-6, outs[1], NONE)
    assert torch.equal(residual, kept)
    assert torch.equal(outs[0].x_TD, outs[1].x_TD)


def test_emulated_rounding_is_that_of_int8():
    x, ones = randn(9, 320), torch.ones(320, device=DEVICE, dtype=torch.bfloat16)
    outs = poisoned(9, 320), poisoned(9, 320)
    for out, rounding in zip(outs, (INT8, EMULATED), strict=True):
        norm.residual_norm(x, None, ones, 1e-6, out, rounding)
    assert difference(outs[1].x_TD, rounded_side(outs[0])) < BF16


def sparse(*sizes, seed=0):
    return random_sparse(*sizes, group=128, seed=seed).map(lambda tensor: tensor.to(DEVICE))


@pytest.mark.parametrize("inputs", [128, 256, 384])
def test_packed_sparse_weights_with_zeros_are_the_dense_ones(inputs):
    weight = sparse(3, 70, inputs, seed=int(torch.randint(1000, ())))
    spread, dense = sparse14.to_int4(pack_sparse(weight)), pack_int4(weight.to_int4(), int8=True)
    assert torch.equal(spread.packed, dense.packed)
    assert torch.equal(spread.scales, dense.scales)


def test_values_for_sparse_weights_are_those_for_dense_ones_in_their_order():
    x, ones = randn(5, 384), torch.ones(384, device=DEVICE, dtype=torch.bfloat16)
    outs = poisoned(5, 384), poisoned(5, 384)
    for out, rounding in zip(outs, (INT8, BY_POSITION), strict=True):
        norm.residual_norm(x, None, ones, 1e-6, out, rounding)
    quads = outs[0].q_TD.unflatten(1, (-1, 16, 4))
    assert torch.equal(outs[1].q_TD, quads.transpose(2, 3).flatten(1))
    assert torch.equal(outs[1].scales_TX, outs[0].scales_TX)


def test_packed_weights_are_the_rounded_ones():
    rounded = quantize_int4(randn(3, 40, 192))
    packed = pack_int4(rounded, int8=True)
    signed = packed.packed.view(torch.int8)
    values = torch.cat((signed << 4 >> 4, signed >> 4), dim=-1).double()
    whole = (values * packed.scales.double().unsqueeze(-1)).transpose(1, 2).flatten(2)[..., :192]
    assert torch.equal(whole.float(), rounded.dequantize(torch.float32))


@pytest.mark.parametrize("tokens", [1, 77, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 200), (320, 130), (1024, 640)])
@pytest.mark.parametrize("kind", ["w4a8", "w4a16", "fp8"])
def test_linear(tokens, inputs, outputs, kind):
    x, (weight, plain) = quantized(randn(tokens, inputs)), packed_and_plain(randn(outputs, inputs), kind)
    actual = torch.full((tokens, outputs), math.nan, device=DEVICE)
    linear.linear_packed(x, weight, actual)
    expected = (rounded_side(x) if kind == "w4a8" else x.x_TD.double()) @ plain.t()
    assert difference(actual, expected) < 1e-5


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("kind", ["w4a8", "w4a16", "fp8"])
def test_parts_of_a_product_sum_to_it(tokens, kind):
    x, (weight, plain) = quantized(randn(tokens, 512)), packed_and_plain(randn(130, 512), kind)
    parts = linear.linear_parts(tokens, weight)
    actual = torch.full((tokens * parts, 130), math.nan, device=DEVICE)
    linear.linear_packed(x, weight, actual, parts)
    expected = (rounded_side(x) if kind == "w4a8" else x.x_TD.double()) @ plain.t()
    assert parts > 1
    assert difference(actual.view(tokens, parts, 130).sum(1), expected) < 1e-5


def fp8_codes(nan):
    """All 256 codes in a row of inputs, twice; those of NaN as 0 unless `nan`."""
    codes = torch.arange(256, device=DEVICE, dtype=torch.int32).repeat(2, 1).to(torch.uint8)
    return Fp8Weight(
        codes if nan else codes.where(codes & 127 != 127, 0), torch.ones(2, 2, device=DEVICE), 128
    )


def test_every_fp8_value_is_multiplied_exactly():
    weight, x, actual = (
        fp8_codes(nan=False),
        poisoned(256, 256),
        torch.full((256, 2), math.nan, device=DEVICE),
    )
    x.x_TD.copy_(torch.eye(256, device=DEVICE))
    linear.linear_packed(x, pack_fp8(weight), actual)
    assert torch.equal(actual, weight.values().float().t())


def test_fp8_weights_that_are_not_numbers_give_none():
    assert pack_fp8(fp8_codes(nan=True)).scales.isnan().all()
    assert pack_fp8(fp8_codes(nan=False)).scales.eq(1).all()


@pytest.mark.parametrize("turn", [1, 2, 4])
@pytest.mark.parametrize("inputs", [320, 640])
@pytest.mark.parametrize("kind", ["w4a8", "fp8"])
def test_an_iteration_may_reach_behind_the_last_group(monkeypatch, turn, inputs, kind):
    monkeypatch.setattr(linear, "linear_tile", lambda *_: products.Tile(64, 16, 4, 3, turn))
    x, (weight, plain) = quantized(randn(3, inputs)), packed_and_plain(randn(130, inputs), kind)
    actual = torch.full((3, 130), math.nan, device=DEVICE)
    linear.linear_packed(x, weight, actual)
    expected = (rounded_side(x) if kind == "w4a8" else x.x_TD.double()) @ plain.t()
    assert difference(actual, expected) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 200), (1408, 130), (8192, 40)])
def test_linear_of_few_tokens(tokens, inputs, outputs):
    x, (weight, plain) = quantized(randn(tokens, inputs)), packed_and_plain(randn(outputs, inputs), "w4a8")
    assert few.takes(weight, x)
    actual = torch.full((tokens, outputs), math.nan, device=DEVICE)
    few.linear_few(x, weight, actual)
    assert difference(actual, rounded_side(x) @ plain.t()) < 1e-5
    # What the norm kernel rounds is the bf16 side, too; halves may go to either side.
    itself = torch.full((tokens, outputs), math.nan, device=DEVICE)
    few.linear_few(x, weight, itself, rounded=False)
    assert difference(itself, actual) < 2e-3


def test_few_tokens_go_elsewhere_in_other_formats_and_sizes():
    (whole, _), (halves, _) = (packed_and_plain(randn(64, inputs), "w4a8") for inputs in (256, 320))
    x, more = poisoned(4, 256), poisoned(5, 256)
    assert few.takes(whole, x)
    assert not few.takes(whole, more)
    assert not few.takes(whole, poisoned(4, 256, piece=64))
    assert not few.takes(halves, poisoned(4, 320))
    assert not few.takes(packed_and_plain(randn(64, 256), "w4a16")[0], x)
    assert not few.takes(randn(64, 256), x)


@pytest.mark.parametrize(("outputs", "inputs"), [(140, 256), (128, 320), (128, 256)])
@pytest.mark.parametrize("kind", ["w4a8", "fp8"])
def test_widened_weights_are_the_rounded_ones(outputs, inputs, kind):
    weight, plain = packed_and_plain(randn(3, outputs, inputs), kind)
    assert difference(wide.widen(weight), plain) < BF16


@pytest.mark.parametrize("tokens", [1, 50])
def test_latents_are_written_where_they_belong(tokens):
    heads, plain, rope, rank = 4, 32, 16, 64
    joint = randn(tokens, heads * (plain + rope) + rank + rope)
    query, row = joint[:, : -rank - rope], joint[:, -rank - rope :]
    weights = latent.LatentWeights(randn(rank), randn(heads, plain, rank), 1e-6, rank)
    angles = torch.rand(100, rope // 2, device=DEVICE) * 6
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(100, (tokens,), device=DEVICE)
    rows = torch.randperm(128, device=DEVICE)[:tokens]
    cache = torch.full((128, rank + rope), 7.0, device=DEVICE, dtype=torch.bfloat16)
    out = torch.full((tokens, heads, rank + rope), math.nan, device=DEVICE, dtype=torch.bfloat16)
    latent.write_latents(query, row, weights, table, positions, rows, cache, out)

    def turned(x):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        rotation = torch.view_as_complex(table.double())[positions]
        rotation = rotation.view(tokens, *[1] * (pairs.dim() - 2), -1)
        return torch.view_as_real(pairs * rotation).flatten(-2)

    key = row[:, :rank].double()
    normed = key * torch.rsqrt(key.pow(2).mean(1, keepdim=True) + 1e-6) * weights.norm_R.double()
    assert difference(cache[rows], torch.cat((normed, turned(row[:, rank:])), dim=1)) < BF16
    untouched = torch.ones(128, dtype=torch.bool, device=DEVICE).index_fill_(0, rows, False)
    assert (cache[untouched] == 7).all()
    query_THE = query.unflatten(1, (heads, -1))
    absorbed = torch.einsum("thn,hnr->thr", query_THE[..., :plain].double(), weights.key_HNR.double())
    expected = torch.cat((absorbed, turned(query_THE[..., plain:])), dim=-1)
    assert difference(out, expected) < BF16


@pytest.mark.parametrize("slices", [1, 4, 16])
@pytest.mark.parametrize("counts", [[1, 1, 1], [9, 1, 14]])
@pytest.mark.parametrize(("heads", "page"), [(4, 32), (6, 8)])
def test_attention_over_pages_and_the_merge_of_slices(slices, counts, heads, page):
    rank, rope, value = 64, 16, 64
    most = 1 if max(counts) == 1 else 4
    ends = [1, 95, 64] if most == 1 else [9, 33, 64]
    each = 96 // page
    pages = torch.randperm(3 * each, device=DEVICE).view(3, each).int()
    cache = randn(3 * 96, rank + rope)
    positions = torch.cat([torch.arange(e - c, e, device=DEVICE) for c, e in zip(counts, ends, strict=True)])
    tokens = sum(counts)
    query = randn(tokens, heads, rank + rope)
    entries, first = [], 0
    for sequence, count in enumerate(counts):
        entries += [(sequence, first + cut, min(most, count - cut)) for cut in range(0, count, most)]
        first += count
    cut_3C = torch.tensor(entries, device=DEVICE, dtype=torch.int32).t().contiguous()
    token_tiles = attention.TokenTiles(cut_3C[0], cut_3C[1], cut_3C[2], most)
    parts, lse = attention.attend(query, cache, pages, positions, token_tiles, rank, page, 0.1, slices)
    weight = randn(heads, rank, value)
    expected, sequence_T = [], torch.repeat_interleave(torch.tensor(counts)).tolist()
    for t in range(tokens):
        rows = torch.cat([cache[int(p) * page : (int(p) + 1) * page] for p in pages[sequence_T[t]]])
        rows = rows[: int(positions[t]) + 1].double()
        shares = (query[t].double() @ rows.t() * 0.1).softmax(-1)
        expected.append(torch.einsum("hr,hrv->hv", shares @ rows[:, :rank], weight.double()).flatten())
    expected = torch.stack(expected)
    for rounding in ROUNDED:
        out = poisoned(tokens, heads * value, piece_of(value), rounding)
        attention.merge_values(parts, lse, weight, out, rounding)
        actual = rounded_side(out) if rounding is INT8 else out.x_TD
        assert difference(actual, expected) < (0.01 if rounding is NONE else 0.015) + BF16


@pytest.mark.parametrize("rounding", ROUNDED)
@pytest.mark.parametrize("tokens", [2, 9])
def test_values_of_a_head_that_are_no_whole_pieces_are_padded_and_rounded_over_heads(tokens, rounding):
    heads, value, padded, rank, slices = 4, 48, 64, 64, 2
    parts, lse = randn(tokens, heads, slices, rank).float(), randn(tokens, heads, slices).float()
    weight = randn(heads, rank, value)
    out = poisoned(tokens, heads * value, piece_of(value), rounding)
    attention.merge_values(
        parts, lse, functional.pad(weight, (0, padded - value)).contiguous(), out, rounding
    )
    shares = (lse.double() * math.log(2)).softmax(-1)
    latents = torch.einsum("ths,thsr->thr", shares, parts.double())
    expected = torch.einsum("thr,hrv->thv", latents, weight.double()).flatten(1)
    actual = rounded_side(out) if rounding in (INT8, IN_E4M3) else out.x_TD
    assert difference(actual, expected) < ROUNDED[rounding] + BF16


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_row_of_not_numbers_reaches_no_token_before_it(wrong):
    """Tiles of 4 tokens, whose last block of rows is one that only some of them see."""
    rank, rope, heads, page, start, count = 64, 16, 4, 16, 29, 9
    pages = torch.arange(3, device=DEVICE, dtype=torch.int32)[None]
    cache, query = randn(3 * page, rank + rope), randn(count, heads, rank + rope)
    entries = [(0, first, min(4, count - first)) for first in range(0, count, 4)] + [(0, 0, 0)]
    cut_3C = torch.tensor(entries, device=DEVICE, dtype=torch.int32).t().contiguous()
    token_tiles = attention.TokenTiles(cut_3C[0], cut_3C[1], cut_3C[2], 4)
    positions = torch.arange(start, start + count, device=DEVICE)

    def attended(cache):
        parts, lse = attention.attend(query, cache, pages, positions, token_tiles, rank, page, 0.1, 2)
        out = poisoned(count, heads * 64, piece_of(64))
        attention.merge_values(parts, lse, weight, out, NONE)
        return out.x_TD

    weight = randn(heads, rank, 64)
    whole = attended(cache)
    for broken in (0, 2, 5, 8):
        wrong_cache = cache.clone()
        wrong_cache[start + broken, 5] = wrong
        actual = attended(wrong_cache)
        assert torch.equal(actual[:broken], whole[:broken])
        assert not actual[broken:].isfinite().any()


def expanded_attention(cache, query, weights, counts, ends, page, rounding=NONE, splits=1):
    """Values of queries [T, H * (N + P)] over pages in order of their sequences; tiles of 16 tokens."""
    key, value = weights
    each = cache.shape[0] // page // len(counts)
    pages = torch.arange(len(counts) * each, device=DEVICE, dtype=torch.int32).view(len(counts), each).flip(1)
    positions = torch.cat([torch.arange(e - c, e, device=DEVICE) for c, e in zip(counts, ends, strict=True)])
    first_B = torch.from_numpy(cuda.context_firsts(ends)).to(DEVICE)
    rows_C = expanded.context_rows(pages, first_B, sum(ends) + 5, page, 7)
    assert rows_C[sum(ends) :].tolist() == [7] * 5
    cut_3C = np.concatenate((cuda.token_tiles(counts, 16), np.zeros((3, 2), np.int32)), axis=1)
    tiles = attention.TokenTiles(*torch.from_numpy(cut_3C).to(DEVICE).contiguous(), 16)
    contexts = expanded.Contexts(rows_C, first_B, tiles)
    expanded_CO, latents_CW = expanded.expand(cache, contexts.rows_C, expanded.expanding_weights(key, value))
    out = poisoned(len(query), value.shape[0] * value.shape[2], piece_of(value.shape[2]), rounding)
    expanded.attend_expanded(
        query, expanded_CO, latents_CW, positions, contexts, key.shape[1], key.shape[2], 0.1, out, rounding,
        splits=splits,
    )  # fmt: skip
    return out, contexts, positions


@pytest.mark.parametrize(("heads", "value", "splits"), [(3, 64, 1), (3, 192, 4), (4, 48, 2)])
@pytest.mark.parametrize("rounding", ROUNDED)
def test_attention_over_expanded_contexts(heads, value, splits, rounding):
    plain, rope, rank, page, counts, ends = 32, 16, 64, 8, [37, 1, 20], [37, 70, 96]
    cache, query = randn(3 * 96, rank + rope), randn(sum(counts), heads * (plain + rope) + 8)[:, 8:]
    key, weight = randn(heads, plain, rank) / 8, randn(heads, rank, value) / 8
    out, contexts, positions = expanded_attention(
        cache, query, (key, weight), counts, ends, page, rounding, splits
    )
    expected, sequence_T = [], torch.repeat_interleave(torch.tensor(counts)).tolist()
    for t, sequence in enumerate(sequence_T):
        # Pages of a sequence stand in falling order.
        numbers = range((sequence + 1) * len(cache) // page // len(counts) - 1, -1, -1)
        rows = [numbers[at // page] * page + at % page for at in range(int(positions[t]) + 1)]
        first = int(contexts.first_B[sequence])
        assert contexts.rows_C[first : first + len(rows)].tolist() == rows
        seen = cache[rows].double()
        own = query[t].double().view(heads, -1)
        keys = torch.einsum("cr,hnr->hcn", seen[:, :rank], key.double())
        scores = torch.einsum("hn,hcn->hc", own[:, :plain], keys) + own[:, plain:] @ seen[:, rank:].t()
        values = torch.einsum("cr,hrv->hcv", seen[:, :rank], weight.double())
        expected.append(torch.einsum("hc,hcv->hv", (scores * 0.1).softmax(-1), values).flatten())
    actual = rounded_side(out) if rounding in (INT8, IN_E4M3) else out.x_TD
    assert difference(actual, torch.stack(expected)) < max(0.015, ROUNDED[rounding]) + BF16


@pytest.mark.parametrize(("wrong", "splits"), [(math.nan, 1), (math.nan, 2), (math.inf, 4), (-math.inf, 1)])
def test_an_expanded_row_of_not_numbers_reaches_no_token_before_it(wrong, splits):
    heads, plain, rope, rank, page, start, count = 2, 32, 16, 64, 16, 29, 19
    cache, query = randn(48, rank + rope), randn(count, heads * (plain + rope))
    weights = randn(heads, plain, rank), randn(heads, rank, 64)

    def attended(cache):
        own = expanded_attention(cache, query, weights, [count], [start + count], page, splits=splits)
        return own[0].x_TD

    whole = attended(cache)
    for broken in (0, 2, 15, 18):
        wrong_cache, at = cache.clone(), start + broken
        wrong_cache[(2 - at // page) * page + at % page, 5] = wrong
        actual = attended(wrong_cache)
        assert torch.equal(actual[:broken], whole[:broken])
        assert not actual[broken:].isfinite().any()


CHOICES = {
    "sigmoid": (64, Routing(64, 2, 6, normalise=True)),
    "softmax": (64, Routing(64, 0, 2, softmax=True, scale=16.0)),
    "groups by two": (64, Routing(64, 1, 4, (Level(8, 3, 2),), normalise=True, scale=2.5)),
    "groups by one": (64, Routing(64, 2, 3, (Level(4, 2),), softmax=True, normalise=True)),
    # DeepSeek-V2 has groups of 20 experts.
    "groups of 20": (160, Routing(160, 2, 6, (Level(8, 3),), softmax=True, scale=16.0)),
    "three levels": (64, Routing(64, 1, 4, (Level(4, 2, 2), Level(8, 3, 2), Level(16, 4)), normalise=True)),
    "a part of the mass": (64, Routing(64, 1, 6, (Level(8, 3, 2),), normalise=True, scale=2.5, mass=0.6)),
    "a part of all": (64, Routing(64, 0, 6, softmax=True, mass=0.4)),
}


def plain_route(logits_TE, bias_E, choice):
    """Weights of all experts, the shared ones behind, 0 where an expert is not chosen: [T, A]."""
    scores = logits_TE.softmax(-1) if choice.softmax else logits_TE.sigmoid()
    chosen, weights = choose(scores, bias_E, choice)
    shares = torch.zeros(len(scores), choice.experts + 1, dtype=scores.dtype, device=DEVICE)
    shares.scatter_(-1, chosen % (choice.experts + 1), weights)
    return torch.cat((shares[:, :-1], torch.ones_like(shares[:, : choice.shared])), dim=-1)


@pytest.mark.parametrize(("count", "choice"), CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize(
    "tokens", [1, 37, pytest.param(300, marks=pytest.mark.skipif(INTERPRETED, reason="takes a minute"))]
)
def test_router(count, choice, tokens):
    x, weight = randn(tokens, 320), randn(count, 320, dtype=torch.float32) / 18
    bias = torch.randn(count, device=DEVICE) / 20
    counts = torch.zeros(count + choice.shared, dtype=torch.int32, device=DEVICE)
    chosen, weights = router.route(x, weight, bias, choice, counts)
    expected = plain_route(x.double() @ weight.double().t(), bias.double(), choice)
    assert torch.equal(chosen < 0, weights == 0)
    none = expected.shape[1]
    actual = torch.zeros(tokens, none + 1, dtype=torch.float64, device=DEVICE)
    actual = actual.scatter(1, chosen.long() % (none + 1), weights.double())[:, :none]
    assert difference(actual, expected) < 1e-5
    assert torch.equal(counts.long(), (expected > 0).sum(0))


FIXED = [case for case in CHOICES.values() if not case[1].is_dynamic]


@pytest.mark.parametrize(("count", "choice"), [*FIXED, (20, CHOICES["sigmoid"][1])])
def test_rows_that_are_not_numbers_choose_experts_that_exist(count, choice):
    """20 experts stand in a block of 32: the greatest of NaNs may be any place in it."""
    x, weight = randn(9, 320), randn(count, 320, dtype=torch.float32) / 18
    clean = [torch.zeros(count + choice.shared, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    expected, weights = router.route(x, weight, None, choice, clean[0])
    x[4], x[7, 3] = math.nan, math.inf
    chosen, broken_weights = router.route(x, weight, None, choice, clean[1])
    assert ((chosen >= 0) & (chosen < count + choice.shared)).all()
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    assert int(clean[1].sum()) == chosen.numel()
    assert broken_weights[4, : choice.top_k].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 8]
    assert torch.equal(chosen[others], expected[others])
    assert torch.equal(broken_weights[others], weights[others])


def test_a_row_that_is_not_a_number_stays_none_in_int8():
    residual, ones = randn(3, 320), torch.ones(320, device=DEVICE, dtype=torch.bfloat16)
    residual[1, 70] = math.nan
    out = poisoned(3, 320)
    norm.residual_norm(residual, None, ones, 1e-6, out, INT8)
    assert out.scales_TX[1].isnan().all()
    assert out.scales_TX[[0, 2]].isfinite().all()


def test_rows_of_padding_that_nobody_wrote_are_not_added():
    residual, added = randn(4, 128), randn(12, 128)
    added[6:] = math.nan
    expected, out = residual.clone(), poisoned(4, 128)
    ones = torch.ones(128, device=DEVICE, dtype=torch.bfloat16)
    owners = torch.tensor([3, 0, 5] * 2 + [-1] * 6, dtype=torch.int32, device=DEVICE)
    norm.residual_norm(residual, norm.Added(added, experts_M=owners), ones, 1e-6, out, NONE)
    assert torch.equal(residual[2:], expected[2:])
    assert out.x_TD.isfinite().all()


def test_padding_goes_to_no_expert():
    x, weight = randn(8, 64), randn(16, 64, dtype=torch.float32)
    choice = CHOICES["sigmoid"][1]
    counts, valid = torch.zeros(18, dtype=torch.int32, device=DEVICE), torch.tensor([5], device=DEVICE).int()
    chosen, shares = router.route(x, weight, None, choice, counts, valid)
    assert (chosen[5:] == -1).all()
    assert (chosen[:5] >= 0).all()
    assert int(counts.sum()) == 5 * 8
    blocks = experts.sort_by_expert(chosen, counts, 16)
    assert set(blocks.rows.tolist()) & set(range(5 * 8, 8 * 8)) == set()
    assert shares.isfinite().all()


@pytest.mark.parametrize(("tokens", "size"), [(1, 16), (40, 16), (300, 32), (1000, 16)])
def test_tokens_are_sorted_by_expert(tokens, size):
    chosen = torch.randint(12, (tokens, 3), device=DEVICE, dtype=torch.int32)
    chosen[chosen == 5] = 6  # an expert that nobody takes
    counts = chosen.flatten().bincount(minlength=12).int()
    blocks = experts.sort_by_expert(chosen, counts, size)
    seen = []
    for rows, owner in zip(blocks.rows.view(-1, size).tolist(), blocks.experts_C.tolist(), strict=True):
        if owner < 0:
            continue
        own = [row for row in rows if row < chosen.numel()]
        assert own
        assert own == sorted(own)
        assert all(int(chosen.flatten()[row]) == owner for row in own)
        seen += own
    assert sorted(seen) == list(range(chosen.numel()))
    assert not blocks.done_C[blocks.experts_C >= 0].any()
    owners = blocks.experts_C[blocks.experts_C >= 0].tolist()
    assert owners == sorted(owners, key=lambda owner: (-owners.count(owner), owner))


def plain_experts(x_TD, gate_up_AFD, down_ADI, chosen_TK, shares_TK):
    """[T, K, D], float64."""
    out = torch.empty(*chosen_TK.shape, down_ADI.shape[1], dtype=torch.float64, device=DEVICE)
    for t, row in enumerate(chosen_TK.tolist()):
        for k, expert in enumerate(row):
            if expert < 0:
                out[t, k] = 0
                continue
            gate, up = (gate_up_AFD[expert].double() @ x_TD[t].double()).chunk(2)
            hidden = functional.silu(gate) * up
            out[t, k] = down_ADI[expert].double() @ hidden * shares_TK[t, k].double()
    return out


@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 384, 128), (40, 128, 384), (100, 256, 128)])
@pytest.mark.parametrize("both", [True, False])
def test_sparse_experts_are_the_dense_ones(tokens, width, inner, both):
    """both: gate and up are sparse, too, and not only down."""
    count, per_token, values = 4, 2, randn(tokens, width)
    gate_up, down = sparse(count, 2 * inner, width), sparse(count, width, inner, seed=1)
    dense = [pack_int4(each.to_int4(), int8=True) for each in (gate_up, down)]
    chosen = torch.rand(tokens, count, device=DEVICE).topk(per_token).indices.int()
    shares = torch.rand(tokens, per_token, device=DEVICE)
    counts = chosen.flatten().bincount(minlength=count).int()
    weights = [pack_sparse(gate_up) if both else dense[0], pack_sparse(down)]

    def rows(x, gate_up, down):
        cut = experts.expert_tiles(tokens, gate_up.kind)
        blocks = experts.sort_by_expert(chosen, counts, cut.rows)
        return experts.experts_packed(x, gate_up, down, blocks, shares, cut)

    actual = rows(quantized(values, BY_POSITION if both else INT8), *weights)
    assert difference(actual, rows(quantized(values), *dense)) < BF16


@pytest.mark.parametrize("number_format", ["bf16", "fp8", "w4a16", "w4a8"])
@pytest.mark.parametrize(("tokens", "wanted"), [(1, "narrow"), (40, "narrow"), (40, "wide")])
@pytest.mark.parametrize("inner", [128, 64])
def test_experts(number_format, tokens, wanted, inner):
    count, width, per_token = 6, 192, 3
    x = quantized(randn(tokens, width))
    gate_up, down = randn(count, 2 * inner, width) / 16, randn(count, width, inner) / 11
    chosen = torch.rand(tokens, count, device=DEVICE).topk(per_token).indices.int()
    chosen.view(-1)[2::5] = -1  # no expert
    shares = torch.rand(tokens, per_token, device=DEVICE)
    counts = chosen[chosen >= 0].bincount(minlength=count).int()
    packed, int8 = number_format != "bf16", number_format == "w4a8"
    weights, plain = [gate_up, down], [gate_up, down]
    if packed:
        weights, plain = zip(
            *(packed_and_plain(each, number_format) for each in (gate_up, down)), strict=True
        )
    values = rounded_side(x) if int8 else x.x_TD.double()
    cut = experts.expert_tiles(tokens, number_format if packed else None)
    blocks = experts.sort_by_expert(chosen, counts, cut.rows)
    if wanted == "wide":
        read, wide_weights = values.to(torch.bfloat16), [wide.widen(each) for each in weights]
        added = wide.experts_wide(read, *wide_weights, chosen, shares, counts, emulated=int8)
        rows = added.rows_MD[added.order_M]
    elif packed:
        rows = experts.experts_packed(x, *weights, blocks, shares, cut)
        added = norm.Added(rows, experts_M=chosen)
    else:
        rows = experts.experts_bf16(x.x_TD, *weights, blocks, shares, cut)
        added = norm.Added(rows, experts_M=chosen)
    expected = plain_experts(values, *plain, chosen, shares)
    tolerance = (0.02 if int8 else 0.01) + 2 * BF16
    for row, wish, expert in zip(rows, expected.flatten(0, 1), chosen.flatten().tolist(), strict=True):
        if expert >= 0:
            assert difference(row, wish) < tolerance
        else:
            row.fill_(math.nan)  # nobody wrote it, so anything may stand there
    rows_MD = rows if added.order_M is None else rows[added.order_M.argsort()]
    residual, out = torch.zeros(tokens, width, dtype=torch.bfloat16, device=DEVICE), poisoned(tokens, width)
    ones = torch.ones(width, dtype=torch.bfloat16, device=DEVICE)
    norm.residual_norm(residual, norm.Added(rows_MD, added.order_M, added.experts_M), ones, 1e-6, out, NONE)
    assert difference(residual, expected.sum(dim=1)) < tolerance


@pytest.mark.parametrize("inner", [128, 192])
def test_blocks_that_are_half_empty_or_not_give_the_same(inner):
    width, rows_of = 256, (100, 70, 20)
    x = quantized(randn(sum(rows_of), width))
    [gate_up, down] = (
        packed_and_plain(randn(len(rows_of), *sizes) / 16, "w4a8")[0]
        for sizes in ((2 * inner, width), (width, inner))
    )
    counts = torch.tensor(rows_of, dtype=torch.int32, device=DEVICE)
    chosen = torch.arange(3, device=DEVICE).repeat_interleave(counts)[torch.randperm(sum(rows_of))]
    chosen, shares = chosen.int()[:, None], torch.rand(sum(rows_of), 1, device=DEVICE)
    found = []
    for mean, size in ((0, 32), (experts.MANY_ROWS + 1, 64)):
        cut = experts.expert_tiles(sum(rows_of), "w4a8", mean)
        assert cut.rows == size
        blocks = experts.sort_by_expert(chosen, counts, size)
        found.append(experts.experts_packed(x, gate_up, down, blocks, shares, cut))
    assert torch.equal(*found)


def test_the_second_product_waits_for_the_first():
    """On a GPU it starts early; the memory of the hidden values holds those of other tokens before."""
    count, width, inner, tokens = (4, 256, 128, 20) if INTERPRETED else (24, 2048, 1408, 256)
    gate_up, down = (
        packed.pack_values(
            torch.randint(-8, 8, (count, inputs // 128, outputs, 128), dtype=torch.int8, device=DEVICE),
            torch.rand(count, inputs // 128, outputs, device=DEVICE) / inputs,
            inputs,
        )
        for outputs, inputs in ((2 * inner, width), (width, inner))
    )
    chosen = torch.rand(tokens, count, device=DEVICE).topk(3).indices.int()
    counts, shares = chosen.flatten().bincount(minlength=count).int(), torch.rand(tokens, 3, device=DEVICE)
    cut = experts.expert_tiles(tokens, "w4a8")
    for _ in range(1 if INTERPRETED else 10):
        x = quantized(randn(tokens, width))
        blocks = experts.sort_by_expert(chosen, counts, cut.rows)
        hidden = experts.gate_up_packed(x, gate_up, blocks, tokens * 3, 3, cut.gate_up)
        expected = experts.down_packed(hidden, down, blocks, shares, cut.down)
        fresh = experts.sort_by_expert(chosen, counts, cut.rows)
        assert torch.equal(experts.experts_packed(x, gate_up, down, fresh, shares, cut), expected)
        assert torch.equal(fresh.done_C[fresh.experts_C >= 0].unique(), blocks.done_C[:1])


def test_values_in_e4m3_are_the_nearest():
    """The largest is 448, so that the scale is 1; halfway cases, subnormals and zeros are among them."""
    codes = torch.arange(127, dtype=torch.uint8, device=DEVICE).view(E4M3).float()
    x_I = torch.cat((codes, (codes[1:] + codes[:-1]) / 2, (codes[1:] * 7 + codes[:-1]) / 8, -codes))
    x = poisoned(1, 512, rounding=IN_E4M3)
    x.x_TD[0] = functional.pad(x_I, (0, 512 - len(x_I)))
    norm.round_values(x, IN_E4M3)
    assert x.scales_TX.item() == 1
    assert torch.equal(x.q_TD.float(), x.x_TD.to(E4M3).float())


def test_the_norm_rounds_rows_to_e4m3():
    x_TD = randn(9, 320)
    x_TD[3] *= 1e4
    x_TD[5] = 0
    x_TD[6, 7] = math.nan
    x = quantized(x_TD, IN_E4M3)
    finite = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8], device=DEVICE)
    error = (rounded_side(x) - x.x_TD.double())[finite].abs()
    assert (error <= x.x_TD[finite].abs() / 15.9 + x.scales_TX[finite] * 2.0**-10).all()
    assert rounded_side(x)[6].isnan().all()


@pytest.mark.parametrize(("outputs", "inputs"), [(140, 256), (160, 320), (160, 256)])
def test_weights_in_e4m3_are_exact_where_their_scale_is_the_largest(outputs, inputs):
    weight, plain = packed_and_plain(randn(3, outputs, inputs), "w4a8")
    rows = e4m3.widen_rows(weight)
    actual = rows.values.double() * rows.scales.double().unsqueeze(-1)
    assert ((actual - plain).abs() <= plain.abs() / 15.9).all()
    largest = weight.scales == weight.scales.amax(-2, keepdim=True)
    groups = largest.transpose(-1, -2).repeat_interleave(128, -1)[..., :inputs]
    assert torch.allclose(actual[groups], plain[groups], rtol=1e-6)
    assert not torch.allclose(actual[~groups], plain[~groups], rtol=1e-6)


def test_scales_in_e4m3_may_be_negative():
    """Some formats of checkpoints have such."""
    weight, plain = packed_and_plain(randn(3, 144, 256), "w4a8")
    weight.scales.neg_()
    rows = e4m3.widen_rows(weight)
    actual = rows.values.double() * rows.scales.double().unsqueeze(-1)
    assert ((actual + plain).abs() <= plain.abs() / 15.9).all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_linear_in_e4m3(tokens):
    weight, plain = packed_and_plain(randn(208, 320), "w4a8")
    x = quantized(randn(tokens, 320), IN_E4M3)
    assert difference(e4m3.linear_e4m3(x, weight), x.x_TD.double() @ plain.t()) < 2 * FP8


@pytest.mark.parametrize("inner", [128, 64])
def test_experts_in_e4m3(inner, monkeypatch):
    multiply_in_e4m3(monkeypatch)
    count, width, per_token, tokens = 6, 192, 3, 40
    x = quantized(randn(tokens, width), IN_E4M3)
    weights, plain = zip(
        *(
            packed_and_plain(randn(count, *size) / 14, "w4a8")
            for size in ((2 * inner, width), (width, inner))
        ),
        strict=True,
    )
    chosen = torch.rand(tokens, count, device=DEVICE).topk(per_token).indices.int()
    chosen.view(-1)[2::5] = -1  # no expert
    shares = torch.rand(tokens, per_token, device=DEVICE)
    counts = chosen[chosen >= 0].bincount(minlength=count).int()
    added = e4m3.experts_e4m3(x, *weights, chosen, shares, counts)
    expected = plain_experts(x.x_TD, *plain, chosen, shares)
    assert added.order_M is not None
    rows = added.rows_MD[added.order_M]
    there = chosen.flatten() >= 0
    # Three products of two rounded factors each: gate, up and down.
    assert difference(rows[there], expected.flatten(0, 1)[there]) < 0.08
    residual, out = torch.zeros(tokens, width, dtype=torch.bfloat16, device=DEVICE), poisoned(tokens, width)
    ones = torch.ones(width, dtype=torch.bfloat16, device=DEVICE)
    norm.residual_norm(residual, added, ones, 1e-6, out, NONE)
    assert difference(residual, expected.sum(dim=1)) < 0.08


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("width", "inner"), [(256, 128), (512, 384), (1280, 512)])
@pytest.mark.parametrize("routed", [3, 0])
def test_experts_of_few_tokens(tokens, width, inner, routed):
    """Three that the router chose and two that every token takes; or all five taken, as in a dense block."""
    count, per_token = (8, 5) if routed else (5, 5)
    x = quantized(randn(tokens, width))
    (gate_up, plain_gate_up), (down, plain_down) = (
        packed_and_plain(randn(count, *size) / 16, "w4a8") for size in ((2 * inner, width), (width, inner))
    )
    taken = torch.arange(count - per_token + routed, count, device=DEVICE).expand(tokens, -1)
    chosen = torch.rand(tokens, count - 2, device=DEVICE).topk(routed).indices
    chosen = torch.cat((chosen, taken), dim=1).int().contiguous()
    shares = torch.rand(tokens, per_token, device=DEVICE)
    rows = few.experts_few(x, gate_up, down, few.Taken(chosen, routed, int(taken[0, 0])), shares)
    expected = plain_experts(rounded_side(x), plain_gate_up, plain_down, chosen, shares)
    for row, wish in zip(rows, expected.flatten(0, 1), strict=True):
        assert difference(row, wish) < 0.02 + 2 * BF16


@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 256, 128), (2, 640, 128), (2, 384, 640)])
def test_sparse_experts_of_few_tokens(tokens, width, inner):
    x = randn(tokens, width)
    gate_up, down = sparse(5, 2 * inner, width), sparse(5, width, inner, seed=1)
    chosen = torch.tensor([[4, 3], [1, 3]], device=DEVICE, dtype=torch.int32)[:tokens]
    taken, shares = few.Taken(chosen, 1, 3), torch.rand(tokens, 2, device=DEVICE)
    packed = pack_sparse(gate_up), pack_sparse(down)
    rows = few.experts_few(quantized(x, BY_POSITION), *packed, taken, shares)
    dense = [each.dequantize().double() for each in (gate_up, down)]
    expected = plain_experts(rounded_side(quantized(x)), *dense, chosen, shares)
    for row, wish in zip(rows, expected.flatten(0, 1), strict=True):
        assert difference(row, wish) < 0.02 + 2 * BF16


def test_few_rows_of_padding_are_no_experts():
    x = quantized(randn(2, 256))
    (gate_up, _), (down, _) = (packed_and_plain(randn(4, 256, inputs), "w4a8") for inputs in (256, 128))
    chosen = torch.tensor([[2, 0], [-1, -1]], device=DEVICE, dtype=torch.int32)
    shares = torch.ones(2, 2, device=DEVICE)
    alone = few.experts_few(quantized(x.x_TD[:1]), gate_up, down, few.Taken(chosen[:1], 2, 4), shares[:1])
    rows = few.experts_few(x, gate_up, down, few.Taken(chosen, 2, 4), shares)
    assert torch.equal(rows[:2].isfinite(), alone.isfinite())


def test_a_dense_block_is_the_sum_of_its_experts():
    gate_up, down, x = (torch.randn(*size).double() for size in ((600, 16), (16, 300), (4, 16)))
    gate, up = (x @ gate_up.t()).chunk(2, dim=1)
    expected = (functional.silu(gate) * up) @ down.t()
    total = torch.zeros_like(x)
    parts = split_dense(Dense(gate_up), Dense(down), 3)
    for own_gate_up, own_down in zip(*(part.dense for part in parts), strict=True):
        gate, up = (x @ own_gate_up.t()).chunk(2, dim=1)
        total += (functional.silu(gate) * up) @ own_down.t()
    assert torch.allclose(total, expected)


@pytest.mark.parametrize(("batch", "vocabulary"), [(1, 100), (5, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_tokens_are_those_of_argmax(batch, vocabulary, dtype):
    scores = randn(batch, vocabulary + 4, dtype=dtype)[:, :vocabulary]
    scores[0, [30, 70]] = 9.0  # the first of equal ones
    tokens, peaks, failed = greedy.best_tokens(scores)
    assert torch.equal(tokens, scores.float().argmax(dim=-1))
    assert tokens[0] == 30
    assert torch.equal(peaks, scores.float().amax(dim=-1))
    assert not failed.any()


def test_rows_without_a_likeliest_token_fail():
    scores = randn(5, 5000, dtype=torch.float32)
    scores[0, 4321], scores[1, 17], scores[2], scores[3, 4999] = math.nan, math.inf, -math.inf, -math.inf
    tokens, peaks, failed = greedy.best_tokens(scores)
    assert failed.tolist() == [True, True, True, False, False]
    assert tokens[:3].tolist() == [0, 0, 0]
    assert peaks.isfinite().tolist() == [False, False, False, True, True]


def test_histograms_of_passes_are_summed():
    counts = torch.randint(3, (4, 11), device=DEVICE, dtype=torch.int32)
    tokens = torch.randint(1 << 40, (4, 11), device=DEVICE)
    active = torch.randint(99, (4,), device=DEVICE)
    expected = tokens + counts, active + (counts[:, :9] > 0).sum(dim=1)
    greedy.add_counts(counts, tokens, active, routed=9)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(active, expected[1])
