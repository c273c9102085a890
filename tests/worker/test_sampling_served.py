"""Choices as users of the library and of gRPC see them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_worker
from moe_api.inference.v1 import inference_pb2
from moe_worker.errors import RequestError
from moe_worker.sampling.parameters import SamplingParameters
from tests.worker.test_invariance import PROMPTS, WAYS, run

PROMPT = [5, 6, 7, 5]
SPECIAL = (b"<|begin|>", b"<|end|>")  # in the text they are nothing


@pytest.fixture(scope="module")
def lasting(endless):
    """An engine whose texts go on to their limit."""
    return moe_worker.Engine(endless, context_length=64, threads=1)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_text_under_a_repetition_penalty_is_that_of_transformers(endless, lasting, penalty):
    model = AutoModelForCausalLM.from_pretrained(endless, dtype=torch.float32, attn_implementation="eager")
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, repetition_penalty=penalty
    )
    [found] = lasting.generate(PROMPT, SamplingParameters(max_tokens=40, repetition_penalty=penalty))
    [plain] = lasting.generate(PROMPT, SamplingParameters(max_tokens=40))
    assert found.token_ids == expected[0, len(PROMPT) :].tolist()
    assert found.token_ids != plain.token_ids


def test_a_stop_token_ends_the_text_and_is_not_shown(lasting):
    [free] = lasting.generate(PROMPT, SamplingParameters(max_tokens=30))
    stop = next(token for token in free.token_ids[3:] if token not in free.token_ids[:3])
    [found] = lasting.generate(PROMPT, SamplingParameters(max_tokens=30, stop_token_ids=(stop,)))
    assert found.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert found.finish_reason == "stop"
    shown = b"".join(lasting.tokenizer.token_bytes(token) for token in found.token_ids[:-1])
    assert found.text == shown.decode(errors="replace")


def test_the_end_of_text_is_passed_where_it_is_ignored_and_waits_where_it_must(engine):
    end = engine.config.eos_token_ids[0]
    eager = {"max_tokens": 6, "logit_bias": ((end, 100.0),)}
    [ended] = engine.generate(PROMPT, SamplingParameters(**eager))
    assert (ended.token_ids, ended.finish_reason) == ([end], "stop")
    [passed] = engine.generate(PROMPT, SamplingParameters(**eager, ignore_eos=True))
    assert (passed.token_ids, passed.finish_reason) == ([end] * 6, "length")
    [late] = engine.generate(PROMPT, SamplingParameters(**eager, min_tokens=3))
    assert (late.token_ids.index(end), late.finish_reason) == (3, "stop")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.2}])
def test_log_probabilities_are_those_of_the_model_for_each_token_sent(worker, lasting, sampling):
    request = inference_pb2.GenerateRequest(
        prompt_tokens=inference_pb2.TokenIds(ids=PROMPT),
        sampling=inference_pb2.SamplingParameters(max_tokens=12, logprobs=3, **sampling),
    )
    responses = list(worker.inference.Generate(request))
    tokens = [token for response in responses for token in response.tokens]
    found = [logprobs for response in responses for logprobs in response.logprobs]
    assert [len(response.tokens) for response in responses] == [len(r.logprobs) for r in responses]
    logits = lasting.logits([*PROMPT, *tokens])
    expected = logits[len(PROMPT) - 1 : -1].double().log_softmax(-1)
    assert len(found) == len(tokens) == 12
    for row, token, logprobs in zip(expected, tokens, found, strict=True):
        assert logprobs.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [top.logprob for top in logprobs.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert [row[top.token].item() for top in logprobs.top] == pytest.approx(
            [top.logprob for top in logprobs.top], abs=1e-4
        )
    text = "".join(response.text for response in responses)
    pieces = b"".join(logprobs.piece for logprobs in found if logprobs.piece not in SPECIAL)
    assert pieces.decode(errors="replace") == text
    assert all(
        top.piece == logprobs.piece
        for token, logprobs in zip(tokens, found, strict=True)
        for top in logprobs.top
        if top.token == token
    )


def test_no_log_probabilities_are_sent_where_none_were_asked_for(worker):
    assert not any(response.logprobs for response in worker.generate("hello", max_tokens=3))


def test_token_ids_beyond_the_vocabulary_are_refused_by_the_library(engine):
    for field in ({"stop_token_ids": (320,)}, {"logit_bias": ((320, 1.0),)}):
        with pytest.raises(RequestError, match="token id 320, which is unknown; use ids from 0 to 319"):
            engine.generate(PROMPT, SamplingParameters(**field))


def test_penalized_texts_depend_on_neither_neighbours_nor_preemption(endless):
    sampling = SamplingParameters(
        max_tokens=40, temperature=1.0, seed=5, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=9
    )
    alone = [run(endless, [prompt], sampling)[0][0] for prompt in PROMPTS]
    together, counters = run(endless, PROMPTS, sampling, **WAYS["too few pages, small pieces"])
    assert counters.preemptions > 0
    assert together == alone
