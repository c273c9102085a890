"""A stream that another worker takes up goes on as if nothing had happened, wherever it was cut."""

import grpc
import pytest

from moe_api.inference.v1 import inference_pb2 as pb
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import FinishReason, Request
from moe_worker.sampling.parameters import SamplingParameters
from tests.worker.serving import Worker, refused

PROMPT = tuple(7 + i % 290 for i in range(50))
TOKENS = 40
# A random model's bytes are seldom whole characters, so that most cuts fall inside one.
SAMPLINGS = {
    "greedy": SamplingParameters(max_tokens=TOKENS),
    "seeded": SamplingParameters(max_tokens=TOKENS, temperature=1.3, top_p=0.95, top_k=90, seed=5),
    "unseeded": SamplingParameters(max_tokens=TOKENS, temperature=1.0),
    "penalties": SamplingParameters(
        max_tokens=TOKENS,
        temperature=0.9,
        seed=2**64 - 1,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.7,
    ),
    "greedy with penalties": SamplingParameters(max_tokens=TOKENS, frequency_penalty=1.5),
    "bias and late end": SamplingParameters(
        max_tokens=TOKENS, temperature=1.0, seed=3, min_tokens=25, stop_token_ids=(11, 12, 13, 14),
        logit_bias=((11, 6.0), (12, 6.0)),
    ),
    "logprobs": SamplingParameters(max_tokens=TOKENS, temperature=1.0, seed=8, logprobs=3),
}  # fmt: skip


class Machine:
    """An engine of its own, as another worker would have."""

    def __init__(self, checkpoint):
        options = EngineOptions(device="cpu", dtype="float32", context_length=256, threads=1)
        self.loaded = load(checkpoint, options, progress=False)
        self.core = EngineCore(self.loaded, options)

    def run(self, sampling, written=(), seed=77):
        seed = seed if sampling.seed is None else sampling.seed
        self.core.submit(Request(0, PROMPT, sampling, seed, written=tuple(written)))
        deltas = []
        while not self.core.idle:
            deltas += self.core.step()
        return deltas


@pytest.fixture(scope="module")
def machines(endless):
    return Machine(endless), Machine(endless)


def seen(deltas):
    return [(delta.token, delta.text, delta.finish_reason) for delta in deltas]


def likelihoods(deltas):
    return [
        (delta.logprobs.logprob, *(logprob for _, logprob in delta.logprobs.top)) if delta.logprobs else ()
        for delta in deltas
    ]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_it_goes_on_from_any_token(machines, name):
    first, second = machines
    whole = first.run(SAMPLINGS[name])
    tokens = [delta.token for delta in whole]
    assert len(tokens) > 20
    for cut in (1, 2, 3, 7, 15, 16, 17, len(tokens) - 2, len(tokens) - 1):
        rest = second.run(SAMPLINGS[name], tokens[:cut])
        assert seen(rest) == seen(whole[cut:]), f"cut behind token {cut}"
        for given, expected in zip(likelihoods(rest), likelihoods(whole[cut:]), strict=True):
            assert given == pytest.approx(expected, abs=1e-4)


def test_a_stop_text_across_the_seam_is_found_and_not_sent(machines):
    first, second = machines
    plain = first.run(SamplingParameters(max_tokens=TOKENS, temperature=1.0, seed=4))
    text = "".join(delta.text for delta in plain)
    stop = text[20:26]
    sampling = SamplingParameters(max_tokens=TOKENS, temperature=1.0, seed=4, stop=(stop,))
    whole = first.run(sampling)
    assert whole[-1].finish_reason is FinishReason.STOP
    assert "".join(delta.text for delta in whole) == text[: text.index(stop)]
    for cut in range(1, len(whole)):
        rest = second.run(sampling, [delta.token for delta in whole[:cut]])
        assert seen(rest) == seen(whole[cut:]), f"cut behind token {cut}"


def test_it_may_be_preempted_before_it_is_taken_up_and_again_later(endless):
    room = {"kv_memory": 17 * 16 * 3 * 24 * 4, "prefix_cache": False}
    options = EngineOptions(device="cpu", dtype="float32", context_length=256, threads=1, **room)
    core = EngineCore(load(endless, options, progress=False), options)
    sampling = SAMPLINGS["penalties"]
    whole = [delta.token for delta in Machine(endless).run(sampling)]
    for number in range(4):
        core.submit(Request(number, PROMPT, sampling, sampling.seed, written=tuple(whole[: 5 + number])))
    tokens = {number: whole[: 5 + number] for number in range(4)}
    while not core.idle:
        for delta in core.step():
            tokens[delta.id].append(delta.token)
    assert core.counters.preemptions > 0
    assert all(found == whole for found in tokens.values())


# Over gRPC.


@pytest.fixture(scope="module")
def revised(endless):
    with Worker(endless, "--revision", "r1") as worker:
        worker.wait_ready()
        yield worker


def request(sampling, **resume):
    return pb.GenerateRequest(
        prompt="hello", sampling=pb.SamplingParameters(**sampling), resume=pb.Resume(**resume)
    )


def test_usage_counts_the_whole_text(revised):
    sampling = {"max_tokens": 30, "temperature": 1.0}
    whole = list(revised.inference.Generate(request(sampling, seed=9, revision="r1")))
    tokens = [token for response in whole for token in response.tokens]
    rest = list(revised.inference.Generate(request(sampling, seed=9, revision="r1", tokens=tokens[:12])))
    assert [token for response in rest for token in response.tokens] == tokens[12:]
    assert [response.resumed for response in whole] == [0] * len(whole)
    assert [response.resumed for response in rest] == [12] + [0] * (len(rest) - 1)
    assert rest[-1].usage.prompt_tokens == whole[-1].usage.prompt_tokens
    assert rest[-1].usage.completion_tokens == 30
    assert rest[-1].finish_reason == pb.FINISH_REASON_LENGTH


def test_the_model_names_its_revision_and_no_other_is_taken_up(revised):
    assert revised.inference.GetModel(pb.GetModelRequest()).revision == "r1"
    error = refused(revised.inference.Generate(request({"max_tokens": 5}, revision="r2", tokens=[1])))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "'r2'" in error.details()


@pytest.mark.parametrize(
    ("sampling", "tokens", "sentence"),
    [
        ({"max_tokens": 3}, [1, 2, 3], "resume.tokens: holds 3 tokens of a text of 3; nothing is left of it"),
        ({"max_tokens": 3}, [9999], "resume.tokens: has token id 9999; ids are 0 to"),
        ({"max_tokens": 9, "stop_token_ids": [2]}, [1, 2, 3], "resume.tokens: ends the text with token 1"),
    ],
)
def test_a_text_that_cannot_go_on_is_refused(revised, sampling, tokens, sentence):
    error = refused(revised.inference.Generate(request(sampling, tokens=tokens)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in error.details()
