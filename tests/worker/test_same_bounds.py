"""The frontend refuses by length what a worker refuses by length, of the same field and in the same words."""

from dataclasses import dataclass

import pytest

from moe_api.inference.v1 import inference_pb2
from moe_frontend.transport import bounds
from moe_worker.service import validation

CONTEXT, PER_TOKEN = 64, 6


@dataclass
class Tokenizer:
    characters_per_token: int = PER_TOKEN


def generate(prompt="p", resumed=0, **sampling):
    parameters = inference_pb2.SamplingParameters(**sampling)
    resume = inference_pb2.Resume(tokens=[1] * resumed)
    return inference_pb2.GenerateRequest(prompt=prompt, sampling=parameters, resume=resume)


def formatted(**output_format):
    return inference_pb2.GenerateRequest(
        prompt="p", output_format=inference_pb2.OutputFormat(**output_format)
    )


TAG = inference_pb2.Tag(begin="a", json_schema="{}")


def tagged(**fields):
    return formatted(tagged=inference_pb2.TaggedValues(**fields))


def with_ids(count):
    return inference_pb2.GenerateRequest(prompt_tokens=inference_pb2.TokenIds(ids=[1] * count))


REQUESTS = {
    "prompt": (generate("x" * 378), generate("x" * 379)),
    "prompt in letters of two bytes": (generate("\u00e4" * 378), generate("\u00e4" * 379)),
    "prompt_tokens": (with_ids(63), with_ids(64)),
    "resume.tokens": (generate(resumed=63), generate(resumed=64)),
    "stop": (generate(stop=["x"] * 16), generate(stop=["x"] * 17)),
    "stop_token_ids": (generate(stop_token_ids=[1] * 64), generate(stop_token_ids=[1] * 65)),
    "logit_bias": (
        generate(logit_bias=dict.fromkeys(range(1024), 0.0)),
        generate(logit_bias=dict.fromkeys(range(1025), 0.0)),
    ),
    "json_schema": (formatted(json_schema="x" * 65_536), formatted(json_schema="x" * 65_537)),
    "regex": (formatted(regex="x" * 4_096), formatted(regex="x" * 4_097)),
    "before": (tagged(before="x" * 256), tagged(before="x" * 257)),
    "tags": (tagged(tags=[TAG] * 128), tagged(tags=[TAG] * 129)),
    "schemas": (
        tagged(tags=[inference_pb2.Tag(json_schema="x" * 65_536)]),
        tagged(tags=[inference_pb2.Tag(json_schema="x" * 65_536, end="x")]),
    ),
    "after": (formatted(after="x" * 64), formatted(after="x" * 65)),
    "several": (generate("x" * 378), generate("x" * 379, resumed=64, stop=["x"] * 17)),
}


@pytest.mark.parametrize(("longest", "too_long"), REQUESTS.values(), ids=REQUESTS)
def test_both_refuse_the_same_in_the_same_words(longest, too_long):
    for request, refused in ((longest, False), (too_long, True)):
        ours = bounds.violations(request, bounds.Limits(CONTEXT, PER_TOKEN))
        theirs = validation.oversize(request, Tokenizer(), validation.RequestLimits(320, CONTEXT))
        assert {(it.field, it.description) for it in ours} == {(it.field, it.description) for it in theirs}
        assert bool(ours) == refused


@pytest.mark.parametrize(("length", "refused"), [(384, False), (385, True)])
def test_both_refuse_the_same_texts_to_tokenize(length, refused):
    request = inference_pb2.TokenizeRequest(text="x" * length)
    ours = bounds.violations(request, bounds.Limits(CONTEXT, PER_TOKEN))
    theirs = validation.oversize_text("text", request.text, Tokenizer(), CONTEXT)
    assert [(it.field, it.description) for it in ours] == [(it.field, it.description) for it in theirs]
    assert bool(ours) == refused


@pytest.mark.parametrize(("length", "refused"), [(253, False), (254, True)])
def test_both_refuse_the_same_names(length, refused):
    for kind in (
        inference_pb2.GenerateRequest,
        inference_pb2.TokenizeRequest,
        inference_pb2.GetModelRequest,
    ):
        ours = bounds.violations(kind(model="m" * length), bounds.Limits())
        theirs = validation.oversize_name("m" * length)
        assert [(it.field, it.description) for it in ours] == [(it.field, it.description) for it in theirs]
        assert bool(ours) == refused
