"""The CPU kernels for 1:4 sparse weights against plain torch, on every variant here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.errors import SettingsError
from moe_worker.kernels.cpu import build, library, operations
from moe_worker.kernels.cpu.weights import pack_sparse14
from moe_worker.kernels.reference import swiglu
from moe_worker.quant.int4 import Int4Weight, pack
from moe_worker.quant.int8 import piece_of
from moe_worker.quant.sparse14 import from_int4
from tests.compress.sparse import random, random_sparse
from tests.worker.reference_w4a8 import linear_w4a8

try:
    VARIANTS = library.supported_variants()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

ENGINES = {(name, threads): library.Kernels(name, threads) for name in VARIANTS for threads in (1, 3)}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
SHAPES = settings(max_examples=40, deadline=None)
inputs_of = st.sampled_from([4, 12, 64, 100, 128, 192, 320, 512])
outputs_of = st.sampled_from([1, 5, 16, 24, 33, 100, 128])


def close(ours, truth, share=2e-5):
    assert (ours - truth).abs().max() <= share * truth.abs().max() + 1e-6


def same_but_dense(weight):
    """The same numbers as a dense int4 matrix, for the reference of dense ones."""
    places = 4 * torch.arange(weight.inputs // 4) + weight.positions().long()
    values = torch.zeros(weight.outputs, weight.inputs, dtype=torch.int8).scatter_(1, places, weight.values())
    return Int4Weight(pack(values), weight.scales_OG, None, weight.inputs, weight.group)


@SHAPES
@given(tokens=st.integers(1, 5), inputs=inputs_of, outputs=outputs_of, group=st.sampled_from([4, 64, 128]))
def test_the_reference_agrees_with_that_of_dense_matrices(tokens, inputs, outputs, group):
    weight, x, bias = (
        random_sparse(outputs, inputs, group=group),
        random(tokens, inputs, seed=1),
        random(outputs),
    )
    piece = piece_of(inputs)
    close(weight.multiply(x, bias, piece), linear_w4a8(x, same_but_dense(weight), bias))
    close(weight.multiply(x), x @ weight.dequantize(torch.float32).T)


@every_variant
@SHAPES
@given(
    tokens=st.integers(1, 20),
    inputs=inputs_of,
    outputs=outputs_of,
    group=st.sampled_from([64, 128, 192]),
    piece=st.sampled_from([64, 128]),
    threads=st.sampled_from([1, 3]),
    biased=st.booleans(),
)
def test_linear(variant, tokens, inputs, outputs, group, piece, threads, biased):
    kernels, weight = ENGINES[variant, threads], random_sparse(outputs, inputs, group=group, seed=inputs)
    x, bias = random(tokens, inputs, seed=2), random(outputs, seed=3) if biased else None
    packed = pack_sparse14(weight, bias, piece=piece)
    quantized, _ = operations.quantize(kernels, x, packed)
    ours = operations.linear(kernels, quantized, packed)
    close(ours, weight.multiply(x, bias, piece))


@every_variant
@SHAPES
@given(tokens=st.integers(1, 9), inputs=inputs_of, inner=outputs_of)
def test_paired_linear_is_swiglu(variant, tokens, inputs, inner):
    kernels, weight, x = ENGINES[variant, 3], random_sparse(2 * inner, inputs), random(tokens, inputs, seed=1)
    packed = pack_sparse14(weight, paired=True)
    quantized, _ = operations.quantize(kernels, x, packed)
    ours = operations.linear(kernels, quantized, packed)
    close(ours, swiglu(weight.multiply(x, piece=piece_of(inputs))), 1e-4)


@every_variant
def test_the_largest_values_do_not_saturate(variant):
    for value in (7, -8):
        values = torch.zeros(32, 256, dtype=torch.int8)
        values[:, 3::4] = value
        weight = from_int4(Int4Weight(pack(values), torch.ones(32, 2), None, 256))
        for sign in (1.0, -1.0):
            packed = pack_sparse14(weight)
            quantized, _ = operations.quantize(ENGINES[variant, 1], torch.full((3, 256), 127 * sign), packed)
            ours = operations.linear(ENGINES[variant, 1], quantized, packed)
            assert torch.equal(ours, torch.full((3, 32), value * sign * 127 * 64))


@every_variant
@SHAPES
@given(tokens=st.integers(1, 12), seed=st.integers(0, 9))
def test_experts(variant, tokens, seed):
    kernels, hidden, inner, count = ENGINES[variant, 3], 128, 64, 5
    gate_up = random_sparse(count, 2 * inner, hidden, seed=seed)
    down = random_sparse(count, hidden, inner, seed=seed + 1)
    x = random(tokens, hidden, seed=seed + 2)
    chosen = torch.rand(tokens, count, generator=torch.Generator().manual_seed(seed)).topk(2).indices
    shares = random(tokens, 2, seed=seed + 3)
    packed = pack_sparse14(gate_up, paired=True), pack_sparse14(down)
    quantized, _ = operations.quantize(kernels, x, packed[0])
    ours = operations.experts(kernels, quantized, *packed, (chosen.int(), shares))
    truth = torch.zeros(tokens, hidden)
    for t in range(tokens):
        for expert, share in zip(chosen[t].tolist(), shares[t], strict=True):
            middle = swiglu(gate_up[expert].multiply(x[t : t + 1], piece=piece_of(hidden)))
            truth[t] += share * down[expert].multiply(middle, piece=piece_of(inner))[0]
    close(ours, truth, 2e-2)  # hidden values on the edge between two int8 numbers may fall to either side


@every_variant
def test_a_token_alone_has_the_result_it_has_beside_others(variant):
    weight, x = random_sparse(100, 320), random(13, 320, seed=4)
    packed, kernels = pack_sparse14(weight), ENGINES[variant, 3]
    together = operations.linear(kernels, operations.quantize(kernels, x, packed)[0], packed)
    for t in range(13):
        alone = operations.linear(kernels, operations.quantize(kernels, x[t : t + 1], packed)[0], packed)
        assert torch.equal(alone[0], together[t])


def test_groups_that_the_kernels_cannot_take_are_refused():
    with pytest.raises(SettingsError, match="groups of multiples of 64 inputs, not of 32"):
        pack_sparse14(random_sparse(4, 64, group=32))
