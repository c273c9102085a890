"""Which chat template a checkpoint has, as transformers finds it; and that clients are told."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from moe_api.inference.v1 import inference_pb2
from moe_worker.errors import CheckpointError
from moe_worker.models.chat_template import LARGEST_TEMPLATE, chat_template
from tests.worker.serving import Worker

BEGIN = "<|begin|>"
HERE, THERE = "{{ bos_token }}{{ messages[0].content }}", "other {{ messages[0].content }}"
NAMED = [{"name": "tool_use", "template": THERE}, {"name": "default", "template": HERE}]


@pytest.fixture
def write(checkpoint, tmp_path):
    def write(config=None, jinja=None):
        directory = shutil.copytree(checkpoint, tmp_path / "model", dirs_exist_ok=True)
        if config is not None:
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
        if jinja is not None:
            (directory / "chat_template.jinja").write_bytes(jinja)
        return directory

    return write


@pytest.mark.parametrize(
    ("config", "jinja"),
    [
        ({"chat_template": HERE}, None),
        ({"chat_template": NAMED}, None),
        ({"chat_template": THERE}, HERE.encode()),
        (None, HERE.encode()),
        ({"bos_token": None}, None),
    ],
)
def test_the_template_is_the_one_that_transformers_renders(write, config, jinja):
    directory = write(config, jinja)
    found = chat_template(directory)
    theirs = AutoTokenizer.from_pretrained(directory).chat_template
    theirs = theirs["default"] if isinstance(theirs, dict) else theirs
    assert (found and found.template) == theirs


def test_special_tokens_are_told_as_texts(write):
    config = {
        "chat_template": HERE,
        "bos_token": {"content": "<|begin|>", "lstrip": False},
        "eos_token": "<|end|>",
        "pad_token": None,
        "unk_token": 7,
    }
    found = chat_template(write(config))
    assert dict(found.special_tokens) == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize(
    ("config", "jinja", "sentence"),
    [
        ({"chat_template": 7}, None, "chat_template is not a text"),
        ({"chat_template": "\ud800"}, None, "chat_template is not a text"),
        ({"chat_template": "x" * (LARGEST_TEMPLATE + 1)}, None, "262145 bytes; 262144 are allowed"),
        (None, b"\xff", "is not UTF-8"),
        (None, b"x" * (LARGEST_TEMPLATE + 1), "is too large"),
    ],
)
def test_a_template_that_cannot_be_one_is_refused_with_a_sentence(write, config, jinja, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        chat_template(write(config, jinja))


def test_clients_are_told_the_template_and_a_rendered_prompt_gets_no_second_begin_of_text(write):
    directory = write({"chat_template": HERE, "bos_token": "<|begin|>", "add_bos_token": True})
    with Worker(directory, "--device", "cpu", "--dtype", "float32") as worker:
        worker.wait_ready()
        model = worker.inference.GetModel(inference_pb2.GetModelRequest())
        assert model.chat_template.template == HERE
        assert model.chat_template.special_tokens["bos_token"] == BEGIN
        counts = []
        for rendered in (False, True):
            request = inference_pb2.GenerateRequest(prompt="hello there", without_special_tokens=rendered)
            request.sampling.max_tokens = 1
            counts.append(list(worker.inference.Generate(request))[-1].usage.prompt_tokens)
        assert counts[0] == counts[1] + 1
