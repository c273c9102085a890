"""Published configurations: their flags are kept, their sizes shrunk, and transformers says what is right.

The published files are read from ../shared/data/configs, which is no part of the project.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_worker
from moe_worker.config import parse_model_config, read_checkpoint_config
from moe_worker.config.quantization import Fp8Storage, PackedStorage
from moe_worker.errors import InputError
from moe_worker.models.checkpoint import load_model
from moe_worker.models.stored import Placement
from moe_worker.quant import compressed_tensors as layout
from moe_worker.quant.fp8 import from_blocks
from moe_worker.quant.int4 import Int4Weight, quantize_int4
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.worker.test_formats import fp8, is_projection, rewrite

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "configs"
IDS = [5 + 7 * i % 300 for i in range(60)]
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# Kimi K2 Thinking: routed experts in int4 with groups of 32, everything else in bfloat16.
KIMI_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}


def published(name):
    path = PUBLISHED / f"{name}_config.json"
    if not path.exists():
        pytest.skip(f"{path} is not there: published configurations are no part of the project")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "changes", "context"),
    [
        ("Qwen--Qwen3-30B-A3B", {}, 40960),
        ("Qwen--Qwen3-30B-A3B", {"rope_scaling": QWEN_YARN}, 131072),
        ("Qwen--Qwen3-235B-A22B-FP8", {"rope_scaling": QWEN_YARN | {"factor": 2.0}}, 65536),
        ("deepseek-ai--DeepSeek-V3", {}, 163840),
        ("deepseek-ai--DeepSeek-R1", {}, 163840),
        ("moonshotai--Kimi-K2-Instruct", {}, 131072),
    ],
)
def test_the_context_is_what_the_makers_document(name, changes, context):
    assert parse_model_config(published(name) | changes, name).max_position_embeddings == context


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (QWEN_YARN, 131072),
        ({"type": "yarn", "factor": 4.0}, 4 * 40960),  # the original length is the model's own then
        (QWEN_YARN | {"factor": 1.0}, 40960),
        ({"rope_type": "default"}, 40960),
    ],
)
def test_yarn_multiplies_the_original_context_of_qwen(rope, context):
    values = FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe", "max_position_embeddings": 40960}
    assert parse_model_config(values | {"rope_scaling": rope}, "").max_position_embeddings == context
    # As transformers 5 writes it.
    nested = {"rope_parameters": rope | {"rope_theta": 1e6}}
    config = parse_model_config(values | nested, "")
    assert (config.max_position_embeddings, config.attention.rope.theta) == (context, 1e6)


def test_yarn_reaches_beyond_max_position_embeddings_as_in_transformers(tmp_path):
    directory = write_checkpoint(
        tmp_path, family="qwen3_moe", max_position_embeddings=40, rope_parameters={"rope_theta": 5e4}
    )
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(InputError, match=r"context length 128 is too long.*--config-override"):
        moe_worker.Engine(directory, context_length=128)
    engine = moe_worker.Engine(directory, threads=1, config_override={"rope_scaling": yarn})
    ids = [5 + 7 * i % 300 for i in range(128)]
    reference = AutoModelForCausalLM.from_pretrained(
        directory, rope_parameters=yarn | {"rope_theta": 5e4}, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    assert (engine.logits(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
    with pytest.raises(InputError, match="must be 1 to 128"):
        engine.logits([*ids, 5])
    plain = moe_worker.Engine(directory, threads=1)
    assert not torch.allclose(plain.logits(ids[:30]), expected[:30], atol=1e-3)


def test_published_fp8_and_int4_are_understood():
    assert parse_model_config(published("Qwen--Qwen3-30B-A3B-FP8"), "").storage == Fp8Storage((128, 128))
    kimi = published("moonshotai--Kimi-K2-Instruct")
    assert parse_model_config(kimi, "").storage == Fp8Storage((128, 128))
    thinking = kimi | {"quantization_config": KIMI_INT4}
    assert parse_model_config(thinking, "").storage == PackedStorage(32, symmetric=True)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_of_fp8_blocks_have_any_published_dtype(tmp_path, family, dtype):
    """Qwen's are bfloat16, DeepSeek's float32, and those of the microscaling formats powers of two."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    dense = write_checkpoint(tmp_path / "dense", seed=4, family=family, **sizes)

    def scaled(weight):
        values, scales = fp8(weight)
        return values, scales.to(dtype)

    def stored(name, weight):
        values, scales = scaled(weight)
        return {name: values, f"{name}_scale_inv": scales}

    def plain(name, weight):
        values, scales = scaled(weight)
        return {name: from_blocks(values, scales, (32, 32)).dequantize()}

    config = {
        "activation_scheme": "dynamic",
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [32, 32],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    }
    engine = moe_worker.Engine(rewrite(dense, tmp_path / "fp8", stored, config), threads=1)
    reference = AutoModelForCausalLM.from_pretrained(rewrite(dense, tmp_path / "plain", plain, None)).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0]
    assert (engine.logits(IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()


def as_kimi(directory, quantization=None):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "kimi_k2"}
    path.write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))
    return directory


KIMI = {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_parameters": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 8,
        "rope_type": "yarn",
        "rope_theta": 50000.0,
    },
}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    """A checkpoint of DeepSeek-V3's architecture with Kimi K2's flags, and its logits by transformers."""
    directory = write_checkpoint(tmp_path_factory.mktemp("kimi"), seed=5, eos_token_id=None, **KIMI)
    return directory, _expected(directory)


def _expected(directory):
    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return reference(torch.tensor([IDS])).logits[0]


def test_kimi_k2_is_deepseek_v3_under_another_name(kimi, tmp_path):
    directory, expected = kimi
    engine = moe_worker.Engine(as_kimi(shutil.copytree(directory, tmp_path / "kimi")), threads=1)
    assert engine.config.architecture == "kimi_k2"
    assert (engine.logits(IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def packed_kimi(kimi, tmp_path_factory):
    """The same with routed experts in int4, and logits of what that stands for.

    As published: only routed experts are packed, their scales are bfloat16, and their shapes int32.
    """
    packed, plain = (shutil.copytree(kimi[0], tmp_path_factory.mktemp("int4") / name) for name in "pq")
    stored, meant = {}, {}
    for name, tensor in load_file(packed / "model.safetensors").items():
        if ".mlp.experts." not in name or not is_projection(name):
            stored[name] = meant[name] = tensor
            continue
        rounded = quantize_int4(tensor, 32, torch.bfloat16)
        parts = layout.to_tensors(rounded) | {layout.SHAPE: torch.tensor(tensor.shape, dtype=torch.int32)}
        stored |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        meant[name] = rounded.dequantize().float()
    save_file(stored, packed / "model.safetensors")
    save_file(meant, plain / "model.safetensors")
    return as_kimi(packed, KIMI_INT4), _expected(plain)


@pytest.mark.parametrize("number_format", ["auto", "w4a16", "dense"])
def test_kimis_int4_in_groups_of_32(packed_kimi, number_format):
    directory, expected = packed_kimi
    engine = moe_worker.Engine(directory, format=number_format, threads=1)
    # Scales are bfloat16: what int4 values stand for is computed in it, or in float32.
    assert (engine.logits(IDS) - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_w4a8_keeps_the_values_of_packed_experts_and_rounds_those_beside_them(packed_kimi):
    directory, _ = packed_kimi
    config = read_checkpoint_config(directory)
    placement = Placement(torch.float32, torch.device("cpu"), "w4a8")
    experts = load_model(directory, config, placement, 16, progress=False).layers[1].block.experts
    stored = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj"
    assert isinstance(experts.down_ADI, Int4Weight)
    assert experts.down_ADI.group == 32
    assert torch.equal(experts.down_ADI[3].scales_OG.float(), stored[f"{name}.weight_scale"].float())
    shared = stored["model.layers.1.mlp.shared_experts.down_proj.weight"]
    assert (experts.down_ADI[8].dequantize() - shared).abs().max() <= shared.abs().max() / 7
    moe_worker.Engine(directory, format="w4a8", threads=1).logits(IDS)
