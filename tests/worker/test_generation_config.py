"""generation_config.json: its sampling holds where the user asks for it and the request says nothing else."""

import json
import shutil

import pytest
from transformers import GenerationConfig

from moe_api.inference.v1 import inference_pb2
from moe_worker.errors import ConfigError
from moe_worker.sampling.defaults import sampling_defaults
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.validation import RequestLimits, check_generate, defaults_message, sampling_parameters
from tests.worker.serving import Worker

# As Qwen3 publishes it.
QWEN = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def write(folder, values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def read(folder, values):
    return sampling_defaults(write(folder, values), "auto")


def test_nothing_holds_unless_asked_for(tmp_path):
    assert sampling_defaults(write(tmp_path, QWEN), "none") == SamplingParameters()
    assert sampling_defaults(tmp_path / "nowhere", "auto") == SamplingParameters()


def test_published_defaults_are_those_that_transformers_reads(tmp_path):
    found = read(tmp_path, QWEN | {"repetition_penalty": 1.05, "min_p": 0.1, "max_new_tokens": 777})
    theirs = GenerationConfig.from_pretrained(tmp_path)
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert getattr(found, name) == getattr(theirs, name)
    assert found.max_tokens == theirs.max_new_tokens == 777


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"temperature": 0.0, "top_k": 20}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"top_k": -1, "top_p": None}, {"top_k": 0}),
        ({"temperature": 1, "length_penalty": 3.0, "num_beams": 4}, {"temperature": 1.0}),
    ],
)
def test_what_a_file_means(tmp_path, values, expected):
    assert read(tmp_path, values) == SamplingParameters(**expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"temperature": 9},
            "temperature is 9; use 0 to 2; correct the file, or serve with --generation",
        ),
        ({"top_p": 0}, "top_p is 0; use a number above 0"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a finite number"),
        ({"temperature": 10**400}, "it must be a finite number"),
        ({"top_p": float("nan")}, "top_p is nan; it must be a finite number"),
        ({"do_sample": 1}, "do_sample is 1; it must be true or false"),
        ({"max_new_tokens": 0}, "max_tokens is 0; use 1 or more"),
    ],
)
def test_values_out_of_range_are_refused_with_the_file_and_a_remedy(tmp_path, values, sentence):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, values)
    assert str(error.value).startswith(str(tmp_path / "generation_config.json"))
    assert sentence in str(error.value)


def test_fields_of_a_request_win_even_where_they_are_zero():
    defaults = SamplingParameters(temperature=0.5, top_k=20, max_tokens=500)
    message = inference_pb2.SamplingParameters(temperature=0.0, top_k=0)
    assert sampling_parameters(message, defaults) == SamplingParameters(max_tokens=500)
    assert sampling_parameters(inference_pb2.SamplingParameters(), defaults) == defaults
    assert sampling_parameters(defaults_message(defaults)) == defaults


def test_defaults_reach_a_checked_request():
    defaults = SamplingParameters(temperature=0.6, max_tokens=7)
    request = inference_pb2.GenerateRequest(prompt_tokens=inference_pb2.TokenIds(ids=[5]))
    limits = RequestLimits(320, 100, defaults=defaults)
    assert check_generate(request, None, limits).sampling == defaults


def test_a_worker_says_what_holds_and_computes_with_it(endless, tmp_path):
    directory = shutil.copytree(endless, tmp_path / "model")
    path = directory / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"do_sample": True, "top_k": 5, "max_new_tokens": 9})
    )
    with Worker(directory, "--generation-config", "auto") as worker:
        worker.wait_ready()
        model = worker.inference.GetModel(inference_pb2.GetModelRequest())
        given = model.sampling_defaults
        assert (given.temperature, given.top_k, given.max_tokens) == (1.0, 5, 9)
        request = inference_pb2.GenerateRequest(prompt="the quick")
        assert [*worker.inference.Generate(request)][-1].usage.completion_tokens == 9
        request.sampling.max_tokens = 4
        assert [*worker.inference.Generate(request)][-1].usage.completion_tokens == 4
