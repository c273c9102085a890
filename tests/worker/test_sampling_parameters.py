"""Which choices are allowed, and how those that are not are named; any message gives an answer."""

import math

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_api.inference.v1 import inference_pb2
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.validation import (
    Checked,
    RequestLimits,
    check_generate,
    oversize,
    sampling_parameters,
)
from tests.worker.messages import INPUTS, SAMPLINGS

LIMITS = RequestLimits(vocab_size=320, context_length=64)


@pytest.mark.parametrize(
    ("field", "parameters"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": math.nan}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("top_p", {"top_p": math.nan}),
        ("top_k", {"top_k": -1}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**64}),
        ("stop", {"stop": ("x",) * 17}),
        ("stop[1]", {"stop": ("x", "")}),
        ("stop[0]", {"stop": ("é" * 129,)}),
        ("min_p", {"min_p": -0.1}),
        ("min_p", {"min_p": 1.1}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("repetition_penalty", {"repetition_penalty": math.inf}),
        ("presence_penalty", {"presence_penalty": 2.5}),
        ("frequency_penalty", {"frequency_penalty": math.nan}),
        ("logit_bias", {"logit_bias": tuple((token, 1.0) for token in range(1025))}),
        ("logit_bias", {"logit_bias": ((4, 1.0), (4, 2.0))}),
        ("logit_bias[4]", {"logit_bias": ((4, math.nan),)}),
        ("logit_bias[4]", {"logit_bias": ((4, -101.0),)}),
        ("logit_bias[2000]", {"logit_bias": ((2000, 1.0),)}),
        ("stop_token_ids", {"stop_token_ids": tuple(range(65))}),
        ("stop_token_ids[1]", {"stop_token_ids": (3, 2000)}),
        ("stop_token_ids[0]", {"stop_token_ids": (-1,)}),
        ("min_tokens", {"min_tokens": -1}),
        ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
    ],
)
def test_impossible_parameters_are_named(field, parameters):
    [violation] = SamplingParameters(**parameters).violations(vocab_size=2000)
    assert violation.field == field
    assert "use" in violation.description


def test_the_limits_themselves_are_allowed():
    least = SamplingParameters(1, 0.0, 1e-9, 0, 0, (), 0.0, 0.1, -2.0, -2.0, (), (0,), False, 0, 0)
    most = SamplingParameters(
        max_tokens=100,
        temperature=2.0,
        top_p=1.0,
        top_k=10**6,
        seed=2**64 - 1,
        stop=("x" * 256,) * 16,
        min_p=1.0,
        repetition_penalty=10.0,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        logit_bias=tuple((token, 100.0) for token in range(1024)),
        stop_token_ids=tuple(range(1936, 2000)),
        ignore_eos=True,
        min_tokens=100,
        logprobs=20,
        prompt_logprobs=20,
    )
    assert [least.violations(2000), most.violations(2000)] == [[], []]


def test_what_is_not_set_takes_the_defaults_and_changes_nothing():
    assert sampling_parameters(inference_pb2.SamplingParameters()) == SamplingParameters()
    assert not SamplingParameters().penalizes


def test_every_field_of_the_message_is_a_parameter_and_is_taken_over():
    message = inference_pb2.SamplingParameters(
        max_tokens=5,
        temperature=0.5,
        top_p=0.5,
        top_k=3,
        seed=9,
        stop=["a"],
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={7: 1.5, 3: -2.0},
        stop_token_ids=[4, 5],
        ignore_eos=True,
        min_tokens=2,
        logprobs=0,
        prompt_logprobs=1,
    )
    assert {field.name for field, _ in message.ListFields()} == set(vars(SamplingParameters()))
    assert sampling_parameters(message) == SamplingParameters(
        5, 0.5, 0.5, 3, 9, ("a",), 0.25, 1.5, 0.5, -0.5, ((3, -2.0), (7, 1.5)), (4, 5), True, 2, 0, 1
    )


class Bytes:
    """A tokenizer of one token a byte."""

    def encode_unless_longer(self, text, most, add_special_tokens):
        return list(text.encode())

    characters_per_token = 1


@settings(deadline=None, max_examples=300)
@given(INPUTS, SAMPLINGS)
def test_any_message_gives_parameters_or_sentences(given_input, sampling):
    request = inference_pb2.GenerateRequest(**given_input, sampling=sampling)
    checked = oversize(request, Bytes(), LIMITS) or check_generate(request, Bytes(), LIMITS)
    if isinstance(checked, Checked):
        assert checked.sampling.violations(LIMITS.vocab_size) == []
        assert all(token < LIMITS.vocab_size for token, _ in checked.sampling.logit_bias)
        return
    assert checked
    for violation in checked:
        names = violation.field.split("[")[0].split(".")
        message = inference_pb2.GenerateRequest.DESCRIPTOR
        for name in names:
            message = message.fields_by_name[name].message_type or message
        assert violation.description


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_that_parse_give_parameters_or_sentences(data):
    message = inference_pb2.SamplingParameters()
    try:
        message.ParseFromString(data)
    except DecodeError:  # refused before it comes here
        return
    found = sampling_parameters(message).violations(LIMITS.vocab_size)
    assert all(violation.field and violation.description for violation in found)
