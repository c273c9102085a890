"""Checkpoints as they are published: FP8 in blocks, int4 packed; and rounding to four bits at load."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_worker
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import explain_choice
from moe_worker.errors import InputError
from moe_worker.quant import compressed_tensors as layout
from moe_worker.quant.fp8 import from_blocks, quantize_fp8
from moe_worker.quant.int4 import quantize_int4
from moe_worker.quant.int8 import piece_of
from tests.checkpoints import write_checkpoint

IDS = [5 + 7 * i % 300 for i in range(60)]
SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 192, "kv_lora_rank": 64}
KEPT = ("norm", "embed_tokens", "gate.weight", "bias", "lm_head")


def is_projection(name):
    return name.endswith(".weight") and not any(part in name for part in KEPT)


def rewrite(source, directory, change, quantization_config):
    """A copy whose projections are stored as `change` (name, weight -> tensors) says."""
    shutil.copytree(source, directory)
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        tensors |= change(name, tensor) if is_projection(name) else {name: tensor}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    config = json.loads((directory / "config.json").read_text())
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("dense"), seed=3, eos_token_id=None, **SIZES)


def fp8(weight):
    """Blocks of 32 x 32, so that small matrices have several."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 32), -(-columns // 32))
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            block = (slice(32 * r, 32 * r + 32), slice(32 * c, 32 * c + 32))
            scales[r, c] = weight[block].abs().max() / 448
            out[block] = (weight[block] / scales[r, c]).to(torch.float8_e4m3fn)
    return out, scales


def test_fp8_blocks_are_read_as_what_they_stand_for(dense, tmp_path):
    def stored(name, weight):
        values, scales = fp8(weight)
        return {name: values, f"{name}_scale_inv": scales}

    def plain(name, weight):
        return {name: from_blocks(*fp8(weight), (32, 32)).dequantize()}

    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}
    directory = rewrite(dense, tmp_path / "fp8", stored, config)
    quantized = moe_worker.Engine(directory, threads=1)
    plain_directory = rewrite(dense, tmp_path / "plain", plain, None)
    exact = moe_worker.Engine(plain_directory, threads=1)
    assert torch.equal(quantized.logits(IDS), exact.logits(IDS))
    # In float32 products of stacked experts are summed in another order than those of one after the other.
    taken = moe_worker.Engine(directory, format="fp8", threads=1).logits(IDS)
    reference = AutoModelForCausalLM.from_pretrained(plain_directory).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0]
    for other in (exact.logits(IDS), expected):
        assert (taken - other).abs().max() <= 1e-5 * other.abs().max()


def test_a_dense_checkpoint_in_fp8_is_the_one_it_is_rounded_to(dense, tmp_path):
    directory = shutil.copytree(dense, tmp_path / "rounded")
    tensors = load_file(directory / "model.safetensors")
    kept = ("norm", "embed", "bias", "mlp.gate.", "kv_b_proj")
    rounded = {
        name: tensor if any(part in name for part in kept) else quantize_fp8(tensor).dequantize()
        for name, tensor in tensors.items()
    }
    assert sum(not torch.equal(rounded[name], tensors[name]) for name in tensors) > 20
    save_file(rounded, directory / "model.safetensors")
    expected = moe_worker.Engine(directory, threads=1).logits(IDS)
    actual = moe_worker.Engine(dense, format="fp8", threads=1).logits(IDS)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module", params=[True, False], ids=["symmetric", "asymmetric"])
def packed(request, dense, tmp_path_factory):
    """A pack-quantized checkpoint, and transformers' model with the weights that it stands for."""
    return write_packed(dense, tmp_path_factory.mktemp("packed"), 32, request.param)


def write_packed(dense, root, group, symmetric):
    def matrix(weight):
        rounded = quantize_int4(weight, group)
        if symmetric:
            return rounded
        zeros = torch.randint(-3, 4, rounded.scales_OG.shape, generator=torch.Generator().manual_seed(1))
        return replace(rounded, zeros_OG=zeros.to(torch.int8))

    def stored(name, weight):
        stem = name.removesuffix("weight")
        return {stem + part: tensor for part, tensor in layout.to_tensors(matrix(weight)).items()}

    def plain(name, weight):
        return {name: matrix(weight).dequantize()}

    config = layout.quantization_config(group, symmetric, ["lm_head"])
    directory = rewrite(dense, root / "packed", stored, config)
    reference = AutoModelForCausalLM.from_pretrained(rewrite(dense, root / "plain", plain, None)).eval()
    with torch.no_grad():
        return directory, reference(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("weights", ["dense", "w4a16", "auto"])
def test_packed_weights_are_what_they_stand_for(packed, weights, caplog):
    directory, expected = packed
    actual = moe_worker.Engine(directory, format=weights, threads=1).logits(IDS)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert "ignoring" not in caplog.text


def test_groups_that_the_cpu_kernels_do_not_take_are_multiplied_by_the_reference(dense, tmp_path):
    directory, expected = write_packed(dense, tmp_path, 4, symmetric=True)
    actual = moe_worker.Engine(directory, format="w4a8", threads=1).logits(IDS)
    # That rounds no activations, and not W_UK and W_UV. In random weights a few tokens choose other experts.
    both = torch.stack((actual.flatten(), expected.flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.93
    lines = explain_choice(directory, EngineOptions(device="cpu", format="w4a8"))
    assert "the CPU kernels take groups of multiples of 8 inputs, not of 4" in "\n".join(lines)


@given(st.integers(0, 2**31 - 1), st.integers(1, 5), st.integers(1, 300))
def test_rounded_tokens_err_by_half_a_step_of_each_input_at_most(seed, tokens, inputs):
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(tokens, inputs, generator=generator), torch.randn(7, generator=generator)
    weight = quantize_int4(torch.randn(7, inputs, generator=generator))
    exact = torch.nn.functional.linear(x, weight.dequantize(), bias)
    assert torch.allclose(weight.multiply(x, bias), exact, atol=1e-4)
    step = x.abs().amax(dim=1, keepdim=True) / 127
    most = 0.5001 * step * weight.dequantize().abs().sum(dim=1) + 1e-4
    assert ((weight.multiply(x, bias, piece_of(inputs)) - exact).abs() <= most).all()


@pytest.mark.parametrize("weights", ["fp8", "w4a16", "w4a8"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "qwen3_moe"])
def test_every_family_runs_packed_whatever_the_batch(tmp_path, family, weights):
    directory = write_checkpoint(tmp_path, family=family, eos_token_id=None)
    engine = moe_worker.Engine(directory, format=weights, threads=1, context_length=128, max_batch_size=3)
    sampling = moe_worker.SamplingParameters(max_tokens=20)
    prompts = [IDS[:9], IDS[10:40], IDS[:3], IDS[3:50]]
    assert engine.generate(prompts, sampling) == [engine.generate([p], sampling)[0] for p in prompts]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; it must be 'fp8' or 'compressed-tensors'"),
        ({"quant_method": "fp8"}, "weight_block_size is missing; it must be two integers"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'; it must be 'e4m3'"),
        ({"format": "marlin-24"}, "format is 'marlin-24'; it must be 'pack-quantized'"),
        ({"config_groups": {}}, "it must be an object with one group"),
        ({"config_groups": {"g": {"weights": {"num_bits": 8}}}}, "num_bits is 8; it must be 4"),
        ({"config_groups": {"g": {"targets": []}}}, "has no weights; it must describe them"),
    ],
)
def test_other_ways_of_storing_are_refused_by_name(dense, tmp_path, change, sentence):
    config = layout.quantization_config(32, True, []) | change
    directory = rewrite(dense, tmp_path / "model", lambda name, weight: {name: weight}, config)
    with pytest.raises(InputError, match=sentence):
        moe_worker.Engine(directory)


def test_a_packed_matrix_with_a_part_missing_or_of_another_shape(packed, tmp_path):
    directory = shutil.copytree(packed[0], tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    scale = tensors.pop(f"{name}_scale")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {name}_scale is missing"):
        moe_worker.Engine(directory)
    save_file(tensors | {f"{name}_scale": scale[:, :1].contiguous()}, directory / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {name}_scale has shape"):
        moe_worker.Engine(directory)
    tensors[f"{name}_shape"] = torch.tensor([1, 2])
    save_file(tensors | {f"{name}_scale": scale}, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"o_proj.weight_shape says \[1, 2\], but config.json needs"):
        moe_worker.Engine(directory)


def test_an_unknown_format_is_refused(dense):
    with pytest.raises(InputError, match="format 'int3' is unknown; it must be one of auto, dense"):
        moe_worker.Engine(dense, format="int3")
