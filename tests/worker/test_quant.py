"""Rounding and packing, against the compressed-tensors package where it defines the layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_worker.quant import compressed_tensors as layout
from moe_worker.quant import pieces
from moe_worker.quant.fp8 import from_blocks, quantize_fp8
from moe_worker.quant.int4 import Int4Weight, pack, quantize_int4, unpack
from moe_worker.quant.int8 import quantize_columns, quantize_pieces, round_columns, round_pieces

SEEDS = st.integers(0, 2**31 - 1)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def package(group, symmetric):
    """The compressor of the package, and its description of these weights."""
    # Imported here, because it takes seconds in each process that collects tests.
    from compressed_tensors.compressors.pack_quantized import base  # noqa: PLC0415
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: PLC0415

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group
    )
    return base.PackedQuantizationCompressor, QuantizationScheme(targets=["Linear"], weights=weights)


def asymmetric(weight, group):
    """Plain rounding between the least and the largest weight of a group."""
    grouped = weight.unflatten(-1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = (high - low) / 15
    zero = (-8 - low / scale).round().clamp(-8, 7)
    value = (grouped / scale[..., None] + zero[..., None]).round().clamp(-8, 7)
    return Int4Weight(
        pack(value.flatten(-2).to(torch.int8)), scale, zero.to(torch.int8), weight.shape[1], group
    )


@given(SEEDS, st.lists(st.integers(1, 5), max_size=2), st.integers(1, 70))
def test_packing_loses_nothing(seed, leading, inputs):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (*leading, inputs), generator=generator).to(torch.int8)
    assert torch.equal(unpack(pack(values), inputs), values)


@given(SEEDS, st.integers(1, 9), st.integers(1, 300), st.sampled_from([16, 32, 128]))
def test_rounded_weights_stay_within_half_a_step_unless_clipped(seed, outputs, inputs, group):
    weight = normal(seed, outputs, inputs)
    rounded = quantize_int4(weight, group)
    assert rounded.scales_OG.shape == (outputs, -(-inputs // group))
    step = rounded.scales_OG.repeat_interleave(group, 1)[:, :inputs]
    inside = weight.abs() <= 7 * step
    assert ((rounded.dequantize() - weight).abs()[inside] <= step[inside] * 0.5001).all()
    # No range does worse than the plain one.
    plain = weight.abs().amax(dim=1, keepdim=True) / 7
    if inputs <= group:
        worst = ((weight / plain).round() * plain - weight).square().sum()
        assert (rounded.dequantize() - weight).square().sum() <= worst * 1.0001


def test_a_group_of_zeros_stays_zero():
    assert not quantize_int4(torch.zeros(3, 200)).dequantize().any()


@pytest.mark.parametrize("symmetric", [True, False])
@given(seed=SEEDS, outputs=st.integers(1, 20), groups=st.integers(1, 3), group=st.sampled_from([32, 128]))
def test_the_package_reads_what_we_write(symmetric, seed, outputs, groups, group):
    weight = normal(seed, outputs, groups * group)
    ours = quantize_int4(weight, group) if symmetric else asymmetric(weight, group)
    compressor, scheme = package(group, symmetric)
    theirs = compressor.decompress(layout.to_tensors(ours), scheme)
    assert torch.equal(theirs["weight"], ours.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# From 9 outputs on: 0.20 of the package fails on a single row of words of zero points.
@given(seed=SEEDS, outputs=st.integers(9, 20), groups=st.integers(1, 3), group=st.sampled_from([32, 128]))
def test_we_read_what_the_package_writes(symmetric, dtype, seed, outputs, groups, group):
    weight = normal(seed, outputs, groups * group)
    rounded = asymmetric(weight, group)
    state = {"weight": weight.to(dtype), "weight_scale": rounded.scales_OG.to(dtype)}
    if not symmetric:
        state["weight_zero_point"] = rounded.zeros_OG
    compressor, scheme = package(group, symmetric)
    stored = compressor.compress(state, scheme)
    theirs = compressor.decompress(stored, scheme)["weight"]
    ours = layout.from_tensors(stored, groups * group, group)
    assert torch.equal(ours.dequantize(), theirs)


@given(SEEDS, st.integers(1, 6), st.integers(1, 300), st.sampled_from([64, 128]), st.floats(1e-6, 1e6))
def test_pieces_are_rounded_each_by_its_own_largest(seed, tokens, inputs, piece, size):
    x = normal(seed, tokens, inputs) * size
    values, scales = quantize_pieces(x, piece)
    assert values.dtype == torch.int8
    assert scales.shape == (tokens, -(-inputs // piece))
    for number, part in enumerate(x.split(piece, dim=1)):
        alone, scale = quantize_pieces(part, piece)
        assert torch.equal(alone, values[:, number * piece : number * piece + piece])
        assert torch.equal(scale[:, 0], scales[:, number])
        assert (alone.abs().amax(dim=1) == 127).all()
        assert ((alone * scale - part).abs() <= 0.5001 * scale).all()
    spread = scales.repeat_interleave(piece, dim=1)[:, :inputs]
    assert torch.equal(round_pieces(x, piece), values * spread)


def test_a_piece_of_zeros_has_scale_one():
    values, scales = quantize_pieces(torch.zeros(2, 80), 64)
    assert not values.any()
    assert scales.tolist() == [[1.0, 1.0]] * 2


def test_fp8_blocks_have_scales_of_their_own():
    weight = torch.full((130, 260), 2.0).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 7.0).view(2, 3)
    out = from_blocks(weight, scales, (128, 128)).dequantize()
    assert out.shape == (130, 260)
    assert [out[0, 0], out[0, 128], out[0, 259], out[129, 0], out[129, 259]] == [2, 4, 6, 8, 12]


@given(SEEDS, st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 128 * 300]))
def test_rounding_to_fp8_keeps_four_bits_of_each_weight(seed, outputs, inputs, at_once):
    """e4m3 has three bits behind the first; below 2**-6 of its scale, steps of 2**-9."""
    weight = normal(seed, outputs, inputs) * 0.02
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CPU_PIECE", at_once)
        rounded = quantize_fp8(weight)
    step = rounded.scales_OC.repeat_interleave(128, dim=1)[:, :inputs] * 2**-9
    error = (rounded.dequantize() - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, step / 2) * 1.0001).all()
    for rows, exact in zip(rounded.dequantize().split(128), weight.split(128), strict=True):
        for block, wish in zip(rows.split(128, dim=1), exact.split(128, dim=1), strict=True):
            assert block.abs().max() == pytest.approx(float(wish.abs().max()), rel=1e-6)


def test_a_block_of_zeros_in_fp8_has_scale_one():
    rounded = quantize_fp8(torch.zeros(3, 130))
    assert not rounded.dequantize().any()
    assert (rounded.scales_OC == 1).all()


@given(SEEDS, st.integers(1, 5), st.integers(1, 40), st.integers(-20, 20))
def test_powers_of_two_are_the_least_that_hold_a_column_and_bfloat16_holds_the_products(seed, rows, n, size):
    weight = normal(seed, rows, n).mul_(2.0**size)
    values, scales = quantize_columns(weight, 1)
    assert torch.equal(scales.log2(), scales.log2().round())
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert (largest <= 127 * scales).all()
    assert (largest > 63.5 * scales).all()
    rounded = round_columns(weight, 1)
    assert torch.equal(rounded, values * scales)
    assert ((rounded - weight).abs() <= scales / 2).all()
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert torch.equal(rounded, round_columns(rounded, 1))


def test_columns_of_zeros_stay_and_what_is_not_finite_does_too():
    weight = torch.tensor([[0.0, 0.0, 127.0], [0.0, -0.0, -3.0], [0.0, 0.0, 1.0]])
    assert torch.equal(round_columns(weight, 0), weight)
    weight[1, 0], weight[2, 1] = float("nan"), float("inf")
    assert round_columns(weight, 0).isfinite().all(dim=0).tolist() == [False, False, True]
    assert round_columns(torch.tensor([[3e38], [1e-40]]), 1).isfinite().all()
