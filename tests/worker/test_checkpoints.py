"""Every unusable checkpoint ends in one sentence that names the file and what would be right."""

import json
import math
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moe_worker
from moe_worker.config import parse_model_config, read_checkpoint_config
from moe_worker.config.quantity import parse_bytes
from moe_worker.errors import CheckpointError, ConfigError, InputError, SettingsError
from moe_worker.models.safetensors import read_header
from tests.checkpoints import write_checkpoint, write_tokenizer


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy to damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def refuse(directory, *parts, **options):
    """Loading fails with one sentence that holds all `parts`."""
    with pytest.raises(InputError) as error:
        moe_worker.Engine(directory, **options)
    assert error.value.exit_code == 2
    for part in parts:
        assert part in str(error.value)


def change_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_path_that_is_not_there(tmp_path):
    refuse(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")


def test_a_path_that_is_a_file(broken):
    refuse(broken / "config.json", "is a file", "directory")


def test_no_config(broken):
    (broken / "config.json").unlink()
    refuse(broken, "config.json is missing")


@pytest.mark.parametrize("text", ['{"vocab_size": ', "\x00\xff", "", "[" * 100_000])
def test_config_that_is_not_json(broken, text):
    (broken / "config.json").write_text(text, encoding="latin-1")
    refuse(broken, "config.json is not valid JSON", "copy it again")


def test_config_that_is_no_object(broken):
    (broken / "config.json").write_text("[1]")
    refuse(broken, "config.json must hold a JSON object")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; it must be 'deepseek_v3'"),
        ({"model_type": "absent"}, "model_type is missing"),
        ({"hidden_size": "absent"}, "hidden_size is missing; it must be an integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; it must be an integer from 1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"n_group": 3}, "n_group is 3; it must be a divisor of n_routed_experts (8)"),
        ({"n_group": 8}, "n_group is 8; it must be at most 4"),
        ({"topk_group": 5}, "topk_group is 5; it must be at most n_group (4)"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; it must be at most 4"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; it must be even"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; it must be num_attention_heads (4)"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; it must be 'sigmoid'"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; it must be a finite number above 0"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_type is 'linear'; it must be 'default' or 'yarn'",
        ),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta is 1.0; it must be above 1"),
        ({"rope_parameters": 3}, "rope_parameters is 3; it must be an object"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is missing"),
        ({"bos_token_id": 320}, "bos_token_id is 320; it must be below vocab_size, 320"),
    ],
)
def test_impossible_or_unsupported_fields_are_named(broken, changes, sentence):
    change_config(broken, **changes)
    refuse(broken, "config.json", sentence)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_a_config_of_anything_is_taken_or_refused_with_its_name(checkpoint, data):
    values = json.loads((checkpoint / "config.json").read_text())
    field = data.draw(st.sampled_from(sorted(values)))
    values[field] = data.draw(JSON)
    refusal = None
    try:
        parse_model_config(values, "config.json")
    except ConfigError as error:
        refusal = str(error)
    assert refusal is None or "config.json" in refusal


def test_no_weights(broken):
    (broken / "model.safetensors").unlink()
    refuse(broken, "holds no weights", "model.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, 200_000])
def test_truncated_weights(broken, keep):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(broken, "model.safetensors is truncated or damaged", "copy it again")


def test_weights_that_cannot_be_opened(broken):
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").mkdir()
    refuse(broken, "model.safetensors cannot be read: Is a directory")


@given(head=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
def test_a_hostile_header_is_refused(tmp_path_factory, head, length):
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    path.write_bytes((len(head) if length is None else length).to_bytes(8, "little") + head)
    refusal = None
    try:
        read_header(path)
    except CheckpointError as error:
        refusal = str(error)
    assert refusal is None or str(path) in refusal


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        7,
    ],
)
def test_a_hostile_header_entry_is_refused(broken, entry):
    header = json.dumps({"model.norm.weight": entry}).encode()
    (broken / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refuse(broken, "model.safetensors")


def test_a_missing_shard(tmp_path):
    directory = write_checkpoint(tmp_path, max_shard_size="200KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(directory, str(shard), "is missing", "model.safetensors.index.json lists it")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_a_shard_outside_the_directory(broken, name):
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refuse(broken, repr(name), "must be the name of a file in the same directory")


def test_a_missing_tensor(broken):
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    change_tensors(broken, lambda tensors: tensors.pop(name))
    refuse(broken, name, "is missing", "[32, 64]")


def test_a_tensor_of_another_shape(broken):
    name = "model.layers.2.self_attn.o_proj.weight"
    change_tensors(broken, lambda tensors: tensors.update({name: tensors[name][:, :-1].clone()}))
    refuse(broken, "model.safetensors", name, "[64, 63]", "[64, 64]")


def test_a_tensor_of_a_type_that_cannot_be_read(broken):
    name = "model.norm.weight"
    change_tensors(broken, lambda tensors: tensors.update({name: tensors[name].int()}))
    refuse(broken, name, "is stored as I32; it must be one of F32, F16, BF16")


def test_no_tokenizer(broken):
    (broken / "tokenizer.json").unlink()
    refuse(broken, "tokenizer.json is missing")


def test_a_tokenizer_that_is_none(broken):
    path = broken / "tokenizer.json"
    path.write_text(json.dumps({"decoder": {"type": "ByteLevel"}}))
    refuse(broken, "tokenizer.json is not a tokenizer", "copy it again")


def test_a_tokenizer_of_another_kind(broken):
    path = broken / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": {"type": "Metaspace"}}))
    refuse(broken, "tokenizer.json", "ByteLevel")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    directory = write_checkpoint(tmp_path, vocab_size=300)
    write_tokenizer(directory, 320)
    refuse(directory, "tokenizer.json does not match the model", "ids below 300")


def test_a_tokenizer_without_the_end_token(broken):
    change_config(broken, vocab_size=320, eos_token_id=319)
    (broken / "generation_config.json").unlink()
    write_tokenizer(broken, 310)
    refuse(broken, "tokenizer.json does not match the model", "no token 319", "eos_token_id")


def test_generation_config_names_the_end_tokens(broken):
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert read_checkpoint_config(broken).eos_token_ids == (1, 7)


def test_prediction_layers_are_skipped_with_a_line_in_the_log(broken, caplog):
    change_tensors(
        broken,
        lambda tensors: tensors.update(
            {"model.layers.3.eh_proj.weight": tensors["model.norm.weight"].clone()}
        ),
    )
    with caplog.at_level("INFO"):
        moe_worker.Engine(broken)
    assert "skipping multi-token prediction layers [3]" in caplog.text


def test_kv_memory_too_small_for_one_context(checkpoint):
    one = 512 * 3 * 24 * 4
    refuse(checkpoint, f"takes {one} bytes", "at most 496", context_length=512, kv_memory=one - 1)
    with pytest.raises(InputError, match=r"give at least that$"):
        moe_worker.Engine(checkpoint, context_length=512, kv_memory=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_offload": 1000}, "one page takes 4608; give more, or 0"),
        ({"kv_offload": 1 << 49}, "KV offload of 562949953421312 bytes cannot be allocated in CPU memory"),
        ({"kv_memory": 1000}, "KV memory of 1000 bytes is too small"),
        ({"kv_memory": 1 << 50}, "bytes, more than cpu has free; lower the KV memory"),
        ({"routing_margin": 0.1}, "no routing.json with the loads of layer 1"),
        ({"learn_routing": True}, "no routing.json with the domains of its layers"),
    ],
)
def test_options_are_refused_before_weights_are_read(checkpoint, tmp_path, options, sentence):
    """They are so large that reading them takes minutes; here they are damaged."""
    without = shutil.copytree(checkpoint, tmp_path / "model")
    weights = without / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refuse(without, sentence, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context_length": 5000}, "context length 5000 is too long"),
        ({"context_length": 0}, "context_length is 0; it must be at least 1"),
        ({"max_batch_size": -1}, "max_batch_size is -1"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"device": "3"}, "device '3' is unknown"),
        ({"device": "cuda:99"}, "device cuda:99 is not available"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
    ],
)
def test_impossible_options_are_named(checkpoint, options, sentence):
    refuse(checkpoint, sentence, **options)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000000", 10**6),
        ("2Gi", 2**31),
        ("512Mi", 2**29),
        ("1.5G", 1_500_000_000),
        ("3k", 3000),
        ("1Ki", 1024),
    ],
)
def test_sizes_as_kubernetes_writes_them(text, size):
    assert parse_bytes(text, "--kv-memory") == size


@pytest.mark.parametrize("text", ["", "2GB", "-1", "Gi", "1e3", "2K", "1ki"])
def test_sizes_that_are_none(text):
    with pytest.raises(SettingsError, match=r"^--kv-memory .* is not a size; write bytes as 2Gi"):
        parse_bytes(text, "--kv-memory")
