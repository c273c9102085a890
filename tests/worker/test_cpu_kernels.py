"""The C++ kernels against plain torch, on every variant that this machine can run."""

import ctypes
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.config.moe import Level, Routing
from moe_worker.errors import SettingsError
from moe_worker.kernels.cpu import build, library, operations, structs
from moe_worker.kernels.cpu.operations import PagedRows
from moe_worker.kernels.cpu.weights import aligned_bytes, pack_heads, pack_int4
from moe_worker.kernels.reference import rms_norm, swiglu
from moe_worker.quant.int4 import Int4Weight, pack, quantize_int4
from moe_worker.quant.int8 import quantize_pieces
from tests.worker.reference_w4a8 import experts_w4a8, heads_w4a8, linear_w4a8

try:
    VARIANTS = library.supported_variants()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

ENGINES = {(name, threads): library.Kernels(name, threads) for name in VARIANTS for threads in (1, 2, 3)}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
SHAPES = settings(max_examples=40, deadline=None)
sizes = st.sampled_from([1, 5, 8, 16, 24, 33, 64, 100, 128, 200, 384])


def kernels(variant, threads=2):
    return ENGINES[variant, threads]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours, truth, share=2e-5):
    assert (ours - truth).abs().max() <= share * truth.abs().max() + 1e-6


def random_int4(*shape, group=128, asymmetric=False, seed=0):
    weight = quantize_int4(random(*shape, seed=seed), group)
    if not asymmetric:
        return weight
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    zeros = torch.randint(-8, 8, weight.scales_OG.shape, generator=generator, dtype=torch.int8)
    return Int4Weight(pack(values), weight.scales_OG, zeros, weight.inputs, group)


def test_structs_have_the_sizes_that_the_library_expects():
    for index, arguments in enumerate(structs.OPERATIONS):
        assert ctypes.sizeof(arguments) == library.load().moe_argument_bytes(index), arguments.__name__


def huge_pages_wanted(address):
    """Whether the mapping at `address` has MADV_HUGEPAGE (VmFlags of proc_pid_smaps(5))."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping has {address:#x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
def test_weights_of_all_sizes_lie_in_huge_pages_that_small_ones_share():
    parts = [aligned_bytes(size) for size in (700_000, 1_000, 1_300_000, 2_100_000, 700_000)]
    for index, part in enumerate(parts):
        assert part.data_ptr() % 64 == 0
        assert huge_pages_wanted(part.data_ptr())
        assert huge_pages_wanted(part.data_ptr() + len(part) - 1)
        part.fill_(index)
    assert all((part == index).all() for index, part in enumerate(parts))
    small = [aligned_bytes(1_200_000) for _ in range(40)]
    spans = [(part.data_ptr() >> 21, part.data_ptr() + len(part) - 1 >> 21) for part in small]
    pages = {page for first, last in spans for page in range(first, last + 1)}
    assert len(pages) << 21 < 1.25 * 40 * 1_200_000


def test_small_weights_may_be_packed_in_inference_mode_and_outside():
    with torch.inference_mode():
        aligned_bytes((1 << 21) - 1)  # the next one needs a page
        aligned_bytes(1_000).fill_(1)
    aligned_bytes(1_000).fill_(2)


def test_a_variant_that_this_cpu_cannot_run_is_refused_by_name():
    with pytest.raises(SettingsError, match="cannot run the kernels for sse9"):
        library.Kernels("sse9")


@every_variant
@SHAPES
@given(
    tokens=st.integers(1, 9),
    inputs=sizes,
    group=st.sampled_from([24, 32, 128]),
    piece=st.sampled_from([64, 128]),
    normed=st.booleans(),
)
def test_quantized_tokens(variant, tokens, inputs, group, piece, normed):
    x, norm = random(tokens, inputs) * 3, random(inputs, seed=1)
    x[0] = 0
    reader = pack_int4(random_int4(1, inputs, group=group), piece=piece)
    ours, rounded = operations.quantize(kernels(variant), x, reader, norm if normed else None)
    truth = rms_norm(x, norm, 1e-6) if normed else x
    close(rounded, truth)
    values, scales = quantize_pieces(rounded, piece)  # of what was rounded: to the bit
    assert torch.equal(ours.values_TS[:, :inputs], values)
    assert torch.equal(ours.scales_TX, scales)
    assert not ours.values_TS[:, inputs:].any()
    segment = math.gcd(group, piece)
    sums = torch.stack([part.sum(dim=1) for part in values.int().split(segment, dim=1)], dim=1)
    assert torch.equal(ours.sums_TG, sums.int())


@every_variant
@SHAPES
@given(
    tokens=st.integers(1, 40),
    inputs=sizes,
    outputs=sizes,
    group=st.sampled_from([8, 32, 96, 128, 256]),
    piece=st.sampled_from([64, 128]),
    asymmetric=st.booleans(),
    biased=st.booleans(),
)
def test_linear(variant, tokens, inputs, outputs, group, piece, asymmetric, biased):
    weight = random_int4(outputs, inputs, group=group, asymmetric=asymmetric)
    x, bias = random(tokens, inputs, seed=2), random(outputs, seed=3) if biased else None
    packed = pack_int4(weight, bias, piece=piece)
    quantized, _ = operations.quantize(kernels(variant), x, packed)
    ours = operations.linear(kernels(variant), quantized, packed)
    close(ours, linear_w4a8(x, weight, bias, piece))


@every_variant
def test_the_largest_values_do_not_saturate(variant):
    """All weights 7 or -8 and all activations 127 or -127: the sums that 16 bits could not hold."""
    for value in (7, -8):
        weight = Int4Weight(
            pack(torch.full((32, 256), value, dtype=torch.int8)), torch.ones(32, 2), None, 256
        )
        for sign in (1.0, -1.0):
            x = torch.full((3, 256), 127 * sign)
            packed = pack_int4(weight)
            quantized, _ = operations.quantize(kernels(variant), x, packed)
            ours = operations.linear(kernels(variant), quantized, packed)
            assert torch.equal(ours, torch.full((3, 32), value * sign * 127 * 256))


@every_variant
@SHAPES
@given(tokens=st.integers(1, 12), inputs=sizes, inner=sizes)
def test_paired_linear_is_swiglu(variant, tokens, inputs, inner):
    weight, x = random_int4(2 * inner, inputs), random(tokens, inputs, seed=1)
    packed = pack_int4(weight, paired=True)
    quantized, _ = operations.quantize(kernels(variant), x, packed)
    ours = operations.linear(kernels(variant), quantized, packed)
    close(ours, swiglu(linear_w4a8(x, weight)))


@every_variant
@SHAPES
@given(
    tokens=st.integers(1, 40),
    width=sizes,
    inner=sizes,
    count=st.integers(1, 9),
    per_token=st.integers(1, 3),
    group=st.sampled_from([32, 128]),
)
def test_experts(variant, tokens, width, inner, count, per_token, group):
    per_token = min(per_token, count)
    gate_up = random_int4(count, 2 * inner, width, group=group)
    down = random_int4(count, width, inner, group=group, seed=1)
    x, weights = random(tokens, width, seed=2), random(tokens, per_token, seed=3)
    chosen = torch.rand(tokens, count, generator=torch.Generator().manual_seed(4)).argsort(dim=1)
    chosen = chosen[:, :per_token].int().contiguous()
    packed = pack_int4(gate_up, paired=True), pack_int4(down)
    quantized, _ = operations.quantize(kernels(variant), x, packed[0])
    ours = operations.experts(kernels(variant), quantized, *packed, (chosen, weights))
    # Hidden values that stand at the edge of two integers may round either way: one of 127 steps.
    close(ours, experts_w4a8(x, gate_up, down, chosen, weights), 0.01)


@every_variant
@SHAPES
@given(tokens=st.integers(1, 19), count=st.integers(1, 5), inputs=sizes, outputs=sizes)
def test_heads(variant, tokens, count, inputs, outputs):
    x, weight = random(tokens, count, inputs), random(count, outputs, inputs, seed=1)
    ours = operations.heads(kernels(variant), x, pack_heads(weight))
    close(ours, heads_w4a8(x, weight))
    alone = operations.heads(kernels(variant), x[-1:].contiguous(), pack_heads(weight))
    assert torch.equal(alone[0], ours[-1])


@every_variant
def test_heads_of_more_tokens_than_are_taken_at_once(variant):
    """And a weight of each size that int8 has, a scale of each size, and a token that is not finite."""
    weight = (torch.arange(255.0) - 127).expand(2, 20, 255) * 2.0 ** torch.arange(-10.0, 10).unsqueeze(1)
    x = random(300, 2, 255)
    x[140, 0, 3] = math.nan
    ours, truth = operations.heads(kernels(variant), x, pack_heads(weight)), heads_w4a8(x, weight)
    assert ours[140, 0].isnan().all()
    ours[140, 0] = truth[140, 0] = 0
    for output in range(20):
        close(ours[..., output], truth[..., output])


@every_variant
@SHAPES
@given(
    tokens=st.integers(1, 9),
    width=sizes,
    groups=st.integers(1, 4),
    size=st.integers(2, 9),
    group_best=st.integers(1, 2),
    softmax=st.booleans(),
    normalise=st.booleans(),
    biased=st.booleans(),
    data=st.data(),
)
def test_route(variant, tokens, width, groups, size, group_best, softmax, normalise, biased, data):
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, kept * size))
    x, weight = random(tokens, width), random(groups * size, width, seed=1) / width**0.5
    bias = random(groups * size, seed=2) if biased else None
    levels = (Level(groups, kept, group_best),)
    choice = Routing(groups * size, 1, top_k, levels, softmax, normalise, 2.5)
    chosen, weights = operations.route(kernels(variant), x, weight, bias, choice)
    logits = x @ weight.T
    scores = logits.softmax(dim=-1) if softmax else logits.sigmoid()
    ranked = scores if bias is None else scores + bias
    best = ranked.view(tokens, groups, size).topk(group_best, dim=-1).values.sum(dim=-1)
    inside = torch.zeros(tokens, groups).scatter_(1, best.topk(kept, dim=-1).indices, 1.0)
    masked = ranked.masked_fill(inside.repeat_interleave(size, dim=1) == 0, float("-inf"))
    truth = masked.topk(top_k, dim=-1).indices
    assert torch.equal(chosen[:, :top_k].long(), truth)
    expected = scores.gather(1, truth)
    expected = expected / expected.sum(dim=-1, keepdim=True) if normalise else expected
    close(weights[:, :top_k], expected * 2.5)
    assert (chosen[:, top_k] == groups * size).all()
    assert (weights[:, top_k] == 1).all()


def paged(counts, lengths, width, page_size, dtype=torch.float32):
    """A cache of random rows, with the pages of the sequences shuffled."""
    needed = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(5)).int()
    pages = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for index, part in enumerate(order.split(needed)):
        pages[index, : len(part)] = part
    rows = random((sum(needed) + 1) * page_size, width, seed=6).to(dtype)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    return PagedRows(rows, page_size, pages, starts, torch.tensor(lengths, dtype=torch.int32))


def sequence_rows(cache, index):
    positions = torch.arange(int(cache.lengths_B[index]))
    pages = cache.pages_BN[index][positions // cache.page_size].long()
    return cache.rows_CW[pages * cache.page_size + positions % cache.page_size].float()


@every_variant
@SHAPES
@given(
    sequences=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 100)), min_size=1, max_size=3),
    heads=st.integers(1, 18),
    rank=st.sampled_from([8, 16, 24, 40, 64, 100]),
    rope=st.sampled_from([2, 8, 16]),
    page_size=st.sampled_from([1, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention(variant, sequences, heads, rank, rope, page_size, dtype):
    counts, lengths = [c for c, _ in sequences], [c + before for c, before in sequences]
    cache = paged(counts, lengths, rank + rope, page_size, dtype)
    query = random(sum(counts), heads, rank + rope, seed=7)
    ours = operations.attend(kernels(variant), query, cache, rank, 0.3)
    in_pairs = variant == "avx512-bf16" and dtype == torch.bfloat16
    query = query.to(dtype).float() if in_pairs else query
    truth = []
    for index, part in enumerate(query.split(counts)):
        rows = sequence_rows(cache, index)
        mask = torch.ones(counts[index], lengths[index]).tril(lengths[index] - counts[index])
        scores = torch.einsum("thw,sw->hts", part, rows) * 0.3
        probabilities = scores.masked_fill(mask == 0, float("-inf")).softmax(dim=-1)
        truth.append(torch.einsum("hts,sr->thr", probabilities, rows[:, :rank]))
    close(ours, torch.cat(truth), 2**-8 if in_pairs else 2e-5)  # weights, too, are rounded to bfloat16 there


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_broken_row_reaches_no_token_before_it(variant, dtype, wrong, heads):
    tokens, before, rank, rope = 9, 30, 40, 8
    cache = paged([tokens], [before + tokens], rank + rope, 16, dtype)
    query = random(tokens, heads, rank + rope, seed=2)
    whole = operations.attend(kernels(variant), query, cache, rank, 0.3)
    for broken in range(tokens):
        position = before + broken
        row = int(cache.pages_BN[0, position // 16]) * 16 + position % 16
        rows = cache.rows_CW.clone()
        rows[row, 5] = wrong
        part = dataclasses.replace(cache, rows_CW=rows)
        actual = operations.attend(kernels(variant), query, part, rank, 0.3)
        assert torch.equal(actual[:broken], whole[:broken])
        assert not actual[broken:].isfinite().all(dim=-1).any()


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_normed_turned_and_written(variant, dtype):
    rank, rope, tokens = 40, 8, 5
    cache = paged([tokens], [20], rank + rope, 16, dtype)
    x, norm = random(tokens, rank + rope), random(rank, seed=1)
    angles = random(64, rope // 2, seed=2)
    rotations = torch.polar(torch.ones_like(angles), angles)
    positions, rows = torch.arange(15, 20), torch.tensor([3, 9, 1, 30, 47])
    before = cache.rows_CW.clone()
    operations.write_latents(kernels(variant), x, norm, rotations, (positions, rows), cache)
    pairs = torch.view_as_complex(x[:, rank:].reshape(tokens, -1, 2)) * rotations[positions]
    truth = torch.cat((rms_norm(x[:, :rank], norm, 1e-6), torch.view_as_real(pairs).flatten(1)), dim=1)
    close(cache.rows_CW[rows].float(), truth, 2e-5 if dtype == torch.float32 else 0.004)
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(cache.rows_CW[untouched], before[untouched])


@every_variant
@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(2, 20), threads=st.integers(1, 3))
def test_results_do_not_depend_on_the_batch_or_the_threads(variant, tokens, threads):
    """To the bit: one token alone on one thread, and the same token among others on several."""
    many, one = kernels(variant, threads), kernels(variant, 1)
    gate_up, down = random_int4(4, 96, 200), random_int4(4, 200, 48, seed=1)
    packed = pack_int4(gate_up, paired=True), pack_int4(down)
    x, weights = random(tokens, 200), random(tokens, 2, seed=1)
    chosen = torch.tensor([[0, 2]] * tokens, dtype=torch.int32)
    chosen[1::2, 1] = 3
    all_x, _ = operations.quantize(many, x, packed[0])
    together = operations.experts(many, all_x, *packed, (chosen, weights))
    cache = paged([tokens], [tokens + 50], 72, 16)
    query = random(tokens, 5, 72, seed=2)
    attended = operations.attend(many, query, cache, 64, 0.2)
    for t in range(tokens):
        x_t, _ = operations.quantize(one, x[t : t + 1], packed[0])
        alone = operations.experts(one, x_t, *packed, (chosen[t : t + 1], weights[t : t + 1]))
        assert torch.equal(alone[0], together[t])
        part = PagedRows(cache.rows_CW, 16, cache.pages_BN, torch.tensor([0, 1], dtype=torch.int32),
                         torch.tensor([51 + t], dtype=torch.int32))  # fmt: skip
        assert torch.equal(operations.attend(one, query[t : t + 1], part, 64, 0.2)[0], attended[t])
