"""Scores of prompts are those of transformers, however the engine computes them, and are bounded."""

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_api import rich_status
from moe_api.clock import Anchor
from moe_api.inference.v1 import inference_pb2
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Delta, FinishReason, Request
from moe_worker.errors import RequestError
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.scheduler.plan import SCORED_TOKENS
from moe_worker.service.streams import PROMPT_MOST, Stream, Timeline
from tests.worker.test_invariance import PER_PAGE, PROMPTS

LONG = [3 + (i * i + i // 7) % 310 for i in range(600)]
SCORED = SamplingParameters(max_tokens=40, prompt_logprobs=2)
PLAIN = SamplingParameters(max_tokens=40)


@pytest.fixture(scope="module")
def logprobs(endless):
    """The log-probabilities that transformers gives to the tokens of a prompt, from the second one on."""
    model = AutoModelForCausalLM.from_pretrained(endless, dtype=torch.float32, attn_implementation="eager")

    @torch.inference_mode()
    def of(prompt):
        rows = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        return rows, rows.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1).tolist()

    return of


def scores(checkpoint, prompts, flights=1, before=(), context_length=256, **options):
    """Of each prompt: its scores, the tokens of its text, and the counters of the scheduler."""
    settings = EngineOptions(
        device="cpu", dtype="float32", context_length=context_length, threads=1, max_batch_size=8, **options
    )
    core = EngineCore(load(checkpoint, settings, progress=False), settings, flights=flights)
    for number, prompt in enumerate(before):
        core.submit(Request(1000 + number, tuple(prompt), PLAIN, 0))
        while not core.idle:
            core.step()
    for number, prompt in enumerate(prompts):
        core.submit(Request(number, tuple(prompt), SCORED if number % 2 == 0 else PLAIN, 0))
    found, tokens, steps = {n: [] for n in range(len(prompts))}, {n: [] for n in range(len(prompts))}, []
    while not core.idle:
        deltas = core.step()
        steps.append(sum(len(delta.prompt) for delta in deltas))
        for delta in deltas:
            found[delta.id] += delta.prompt
            tokens[delta.id] += [] if delta.token is None else [delta.token]
            assert not delta.prompt or len(tokens[delta.id]) == 0
    return found, tokens, steps, core.counters


WAYS = {
    "together": {},
    "with a cached prefix": {"before": PROMPTS},
    "prompts cut into pieces of 5": {"prefill_tokens": 5},
    "a step ahead": {"flights": 2},
    "too few pages, a step ahead": {"flights": 2, "kv_memory": 17 * PER_PAGE, "prefill_tokens": 7},
}


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_transformers_in_any_batch(endless, logprobs, way):
    found, tokens, _, counters = scores(endless, PROMPTS, **WAYS[way])
    assert (counters.preemptions > 0) == way.startswith("too few pages")
    _, alone, *_ = scores(endless, [[5]])
    for number, prompt in enumerate(PROMPTS):
        if number % 2:
            assert found[number] == []
            continue
        rows, expected = logprobs(prompt)
        assert [score.logprob for score in found[number]] == pytest.approx(expected, abs=1e-4)
        for row, score in zip(rows, found[number], strict=True):
            assert [value for _, value in score.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert tokens[4] == alone[0]


def test_a_step_scores_a_bounded_number_of_tokens(endless, logprobs):
    found, _, steps, _ = scores(endless, [LONG, LONG[:9], LONG], context_length=1024)
    assert max(steps) <= SCORED_TOKENS < len(LONG)
    _, expected = logprobs(LONG)
    for number in (0, 2):
        assert [score.logprob for score in found[number]] == pytest.approx(expected, abs=2e-4)


def test_scores_come_over_grpc_with_the_tokens_of_the_prompt(worker, logprobs):
    sampling = inference_pb2.SamplingParameters(max_tokens=2, prompt_logprobs=1)
    ids = inference_pb2.TokenIds(ids=PROMPTS[1])
    request = inference_pb2.GenerateRequest(prompt_tokens=ids, sampling=sampling)
    for _ in range(2):  # the second time the cache holds the prompt
        responses = list(worker.inference.Generate(request, timeout=60))
        prompt = [token for response in responses for token in response.prompt]
        assert [token.token for token in prompt] == PROMPTS[1]
        assert not prompt[0].HasField("logprob")
        rows, expected = logprobs(PROMPTS[1])
        assert [token.logprob for token in prompt[1:]] == pytest.approx(expected, abs=1e-4)
        assert [token.top[0].token for token in prompt[1:]] == rows.argmax(-1).tolist()
        assert all(token.piece for token in prompt)
        first = next(number for number, response in enumerate(responses) if response.tokens)
        assert not any(response.prompt for response in responses[first + 1 :])
    request.resume.tokens.append(responses[first].tokens[0])
    assert not any(response.prompt for response in worker.inference.Generate(request, timeout=60))


def test_a_prompt_of_one_token_has_no_scores(worker):
    sampling = inference_pb2.SamplingParameters(max_tokens=1, prompt_logprobs=0)
    request = inference_pb2.GenerateRequest(prompt_tokens=inference_pb2.TokenIds(ids=[5]), sampling=sampling)
    (token,) = [token for response in worker.inference.Generate(request) for token in response.prompt]
    assert (token.token, token.HasField("logprob")) == (5, False)


def test_more_scores_than_a_stream_may_hold_are_refused(engine):
    most = SamplingParameters(prompt_logprobs=20)
    assert not most.prompt_violations(12_483)
    assert (
        "262164 log-probabilities of a prompt of 12484 tokens"
        in most.prompt_violations(12_484)[0].description
    )
    with pytest.raises(RequestError, match="prompt_logprobs is 21; use 0 to 20"):
        engine.generate([5], SamplingParameters(prompt_logprobs=21))


def test_a_worker_names_the_field(worker):
    sampling = inference_pb2.SamplingParameters(prompt_logprobs=21)
    with pytest.raises(grpc.RpcError) as caught:
        list(worker.inference.Generate(inference_pb2.GenerateRequest(prompt="a", sampling=sampling)))
    [violation] = rich_status.field_violations(rich_status.from_error(caught.value))
    assert violation.field == "sampling.prompt_logprobs"


async def test_a_slow_reader_gets_scores_in_bounded_messages():
    stream = Stream(Timeline(Anchor.now(), 0))
    for number in range(25):
        stream.push(Delta(1, "", None, prompt=(TokenLogprobs(-float(number)),) * 100), 1)
    stream.push(Delta(1, "end", 7, FinishReason.LENGTH), 2)
    sizes, tokens = [], []
    while stream.pending:
        chunk = await stream.take()
        sizes.append(len(chunk.prompt))
        tokens += chunk.tokens
        assert (chunk.finish_reason is None) == (stream.pending)
    assert (sizes, tokens) == ([PROMPT_MOST, PROMPT_MOST, 2500 - 2 * PROMPT_MOST], [7])
