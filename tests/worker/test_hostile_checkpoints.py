"""Whatever a checkpoint directory holds, loading ends well or with a sentence: never a traceback."""

import json
import shutil
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moe_worker
from moe_worker.config.directory import find_checkpoint
from moe_worker.config.model import parse_model_config
from moe_worker.errors import CheckpointError, InputError
from moe_worker.models.safetensors import read_header
from moe_worker.models.stored import has_only_numbers
from tests.checkpoints import FAMILIES

NUMBERS = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, -0.5, float("nan"), float("inf")]),
    st.floats(allow_nan=True),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def refusal(call):
    """The sentence that something is refused with; None if it is not."""
    try:
        call()
    except InputError as error:
        return str(error)
    return None


def names(family):
    known = {
        "model_type",
        "hidden_act",
        "quantization_config",
        "rope_parameters",
        "rope_scaling",
        "topk_method",
    }
    known |= {"scoring_func", "mlp_only_layers", "decoder_sparse_step", "rope_theta", "rms_norm_eps"}
    return sorted(known | FAMILIES[family].keys())


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_any_config_is_parsed_or_refused_with_one_sentence(family, data):
    changes = data.draw(st.dictionaries(st.sampled_from(names(family)), VALUES, min_size=1, max_size=3))
    values = FAMILIES[family] | {"model_type": family} | changes
    sentence = refusal(lambda: parse_model_config(values, "config.json").parameters_active)
    if sentence is not None:
        assert sentence.startswith("config.json")
        assert "\n" not in sentence
        assert len(sentence) < 600


@given(data=st.data())
def test_nested_settings_are_parsed_or_refused_too(data):
    name = data.draw(st.sampled_from(["rope_scaling", "quantization_config"]))
    keys = ["type", "rope_type", "factor", "beta_fast", "mscale", "original_max_position_embeddings"]
    keys += ["quant_method", "format", "config_groups", "weight_block_size", "fmt", "rope_theta"]
    known = st.sampled_from(
        ["yarn", "default", "fp8", "compressed-tensors", "pack-quantized", [128, 128], 4.0]
    )
    nested = data.draw(st.dictionaries(st.sampled_from(keys), st.one_of(known, VALUES)))
    values = FAMILIES["deepseek_v3"] | {"model_type": "deepseek_v3", name: nested}
    sentence = refusal(lambda: parse_model_config(values, "config.json"))
    assert sentence is None or "\n" not in sentence


@pytest.mark.parametrize("factor", [1e308, 1e6])
def test_yarn_beyond_any_context_is_refused(factor):
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 32768}
    values = FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe", "rope_scaling": yarn}
    with pytest.raises(CheckpointError, match="a context of at most 16777216 tokens"):
        parse_model_config(values, "config.json")


def circle(folder):
    (folder / "circle").symlink_to(folder / "circle")
    return folder / "circle"


def nameless(folder):
    """A Hugging Face cache whose refs/main names what no file can be called."""
    for name in ("refs", "snapshots"):
        (folder / name).mkdir()
    (folder / "refs" / "main").write_text("a" * 300)
    return folder


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / ("a" * 300), "cannot be opened: File name too long"),
        (circle, "cannot be opened: Too many levels of symbolic links"),
        (lambda folder: folder / "a\0b", "cannot be opened: embedded null byte"),
        (nameless, "with 0 snapshots, and refs/main names none of them"),
    ],
)
def test_names_that_lead_to_no_directory(tmp_path, make, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        find_checkpoint(make(tmp_path))


def headed(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "should take 0 bytes"),
        (b"\x01\x02", "should take"),
        (struct.pack("<Q", 2**63), "should take 9223372036854775808 bytes"),
        (headed(b"[]"), "is not a JSON object"),
        (headed(b"[" * 100_000), "cannot be read"),
        (headed(b'{"a": 1' + b"0" * 5000 + b"}"), "cannot be read"),
        (headed(b'{"a": {}, "a": {}}'), "a name occurs twice"),
        (
            headed(json.dumps({"a": entry(0, 8), "b": entry(4, 12)}).encode(), bytes(12)),
            "overlaps the one",
        ),
        (
            headed(json.dumps({"a": entry(0, 4), "b": entry(6, 10)}).encode(), bytes(10)),
            "leaves 2 bytes",
        ),
        (
            headed(json.dumps({"a": entry(0, 8)}).encode(), bytes(4)),
            "promises 8 bytes of data",
        ),
        (headed(json.dumps({"a": entry(4, 0)}).encode(), bytes(4)), "entry of 'a' is malformed"),
        (headed(json.dumps({"a": entry(0, 4, [-1])}).encode(), bytes(4)), "entry of 'a' is malformed"),
        (headed(json.dumps({"a": entry(0, 4, [1] * 9)}).encode(), bytes(4)), "entry of 'a' is malformed"),
        (headed(json.dumps({"a": entry(0, 2**70)}).encode(), bytes(4)), "entry of 'a' is malformed"),
        (headed(json.dumps({"a": entry(0, True)}).encode(), bytes(1)), "entry of 'a' is malformed"),
    ],
)
def test_hostile_headers(tmp_path, content, sentence):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="copy it again") as error:
        read_header(path)
    assert sentence in str(error.value)


@given(data=st.data())
def test_any_damage_to_a_header_is_noticed_or_harmless(checkpoint, tmp_path_factory, data):
    """Bytes of the real header are overwritten; the rest of the loader then sees only what is consistent."""
    original = (checkpoint / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original[: length + 64])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, length - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(damaged + original[length + 64 :])
    tensors = []
    sentence = refusal(lambda: tensors.extend(read_header(path)))
    assert str(path) in sentence if sentence else sum(t.nbytes for t in tensors) <= len(original)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_refused_unless_told_otherwise(checkpoint, tmp_path, dtype, wrong):
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    tensors[name][3, 4] = wrong
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(
        InputError, match=rf"model.safetensors: tensor {name} holds 1 values that are not finite"
    ):
        moe_worker.Engine(directory)
    moe_worker.Engine(directory, check_weights=False)


@given(data=st.data())
def test_whether_all_elements_are_numbers(data):
    """Against torch's own answer, element by element, over every bit pattern of every dtype of a file."""
    dtype, ints = data.draw(
        st.sampled_from(
            [
                (torch.float32, torch.int32),
                (torch.float16, torch.int16),
                (torch.bfloat16, torch.int16),
                (torch.float8_e4m3fn, torch.uint8),
                (torch.float8_e8m0fnu, torch.uint8),
            ]
        )
    )
    info = torch.iinfo(ints)
    bits = data.draw(st.lists(st.integers(info.min, info.max), max_size=8))
    value = torch.tensor(bits, dtype=ints).view(dtype)
    assert has_only_numbers(value) == bool(value.float().isfinite().all())


def test_numbers_whose_sum_overflows_are_numbers():
    assert has_only_numbers(torch.full((4, 4), 3e38))
    assert has_only_numbers(torch.full((4, 4), 6e4, dtype=torch.float16))
