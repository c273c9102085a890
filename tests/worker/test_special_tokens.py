"""Begin-of-text tokens: the tokenizer's files decide, as in transformers, and none is put twice."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from moe_worker.config.directory import read_checkpoint_config
from moe_worker.errors import TokenizerError
from moe_worker.models.tokenizer import Tokenizer

TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
AROUND = TEMPLATE | {"single": [*TEMPLATE["single"], {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}]}
IDS = ["none", "bytes", "template", "around"]
BOS = {"bos_token": "<|begin|>"}


@pytest.fixture
def write(checkpoint, tmp_path):
    """Writes the tokenizer's files; config.json names a bos_token_id all along, as Qwen's does."""

    def write(post_processor, config):
        directory = shutil.copytree(checkpoint, tmp_path / "model", dirs_exist_ok=True)
        path = directory / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": post_processor}))
        if config is not None:
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return directory

    return write


def ours(directory):
    return Tokenizer.load(directory, read_checkpoint_config(directory))


@pytest.mark.parametrize(
    "post_processor", [None, BYTES, TEMPLATE, AROUND], ids=["none", "bytes", "template", "around"]
)
@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        BOS,
        {"bos_token": None},
        {"bos_token": None, "add_bos_token": True},
        {"bos_token": None, "add_bos_token": False},
        {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None},
    ],
)
def test_where_no_bos_token_is_switched_the_post_processor_decides_as_in_transformers(
    write, post_processor, config
):
    directory = write(post_processor, config)
    expected = AutoTokenizer.from_pretrained(directory)("the quick").input_ids
    assert ours(directory).encode("the quick") == expected


@pytest.mark.parametrize("post_processor", [None, BYTES, TEMPLATE], ids=IDS[:3])
@pytest.mark.parametrize("bos", ["<|begin|>", {"content": "<|begin|>", "lstrip": False}])
@pytest.mark.parametrize("adds", [True, False])
def test_add_bos_token_decides_where_it_is_set(write, post_processor, bos, adds):
    """As published by DeepSeek: LlamaTokenizerFast, add_bos_token, a post-processor that adds none."""
    tokenizer = ours(write(post_processor, {"bos_token": bos, "add_bos_token": adds}))
    plain = tokenizer.encode("the quick", add_special_tokens=False)
    assert tokenizer.encode("the quick") == ([0, *plain] if adds else plain)


@pytest.mark.parametrize("config", [None, BOS | {"add_bos_token": True}])
def test_a_text_that_begins_with_the_token_gets_no_second_one(write, config):
    tokenizer = ours(write(TEMPLATE, config))
    assert tokenizer.encode("<|begin|>the quick") == tokenizer.encode("the quick")
    assert tokenizer.encode("") == [0]


def test_a_bos_token_that_is_none_of_the_tokens(write):
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json: bos_token is '<s>', which"):
        ours(write(None, {"bos_token": "<s>", "add_bos_token": True}))


def test_a_bos_token_that_is_half_a_character(write):
    with pytest.raises(TokenizerError, match=r"bos_token is '\\ud800', which"):
        ours(write(None, {"bos_token": "\ud800", "add_bos_token": True}))


def test_a_post_processor_that_adds_an_id_beyond_the_vocabulary(write):
    tokens = {"<|begin|>": {"id": "<|begin|>", "ids": [5000], "tokens": ["<|begin|>"]}}
    with pytest.raises(TokenizerError, match="its post_processor adds token id 5000, but"):
        ours(write(TEMPLATE | {"special_tokens": tokens}, None))
