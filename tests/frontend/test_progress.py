"""What the frontend remembers of a stream, by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.inference.v1 import inference_pb2 as pb
from moe_frontend.policy.echo import ContractError
from moe_frontend.policy.progress import Progress
from moe_frontend.policy.routing import Trials, replay_after_s


def generate(**sampling):
    return pb.GenerateRequest(prompt="a", sampling=pb.SamplingParameters(**sampling))


def message(text="x", tokens=(1,), **more):
    return pb.GenerateResponse(text=text, tokens=tokens, **more).SerializeToString()


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4), max_size=6))
def test_the_next_replica_is_told_all_tokens_and_the_first_ones_revision(pieces):
    progress = Progress(generate(temperature=1.0))
    seed = progress.request("r1").resume.seed
    for piece in pieces:
        progress.take(message(tokens=piece))
    again = progress.request("r1")
    assert list(again.resume.tokens) == [token for piece in pieces for token in piece]
    assert again.resume.seed == seed
    assert progress.bound_to == ("r1" if pieces else None)


def test_what_the_client_asked_for_is_left_as_it_is():
    request = generate(temperature=1.0, seed=5)
    progress = Progress(request)
    asked = progress.request("")
    assert (asked.prompt, asked.sampling) == (request.prompt, request.sampling)
    assert not asked.resume.HasField("seed")
    assert not Progress(generate()).request("").resume.HasField("seed"), "greedy streams need none"


def test_two_streams_without_a_seed_get_two():
    first, second = (Progress(generate(temperature=1.0)).request("").resume.seed for _ in range(2))
    assert first != second


def test_a_client_may_take_up_a_stream_itself():
    request = generate(temperature=1.0)
    request.resume.MergeFrom(pb.Resume(tokens=[1, 2], seed=7, revision="r1"))
    progress = Progress(request)
    assert progress.bound_to == "r1"
    progress.take(message(tokens=[3]))
    asked = progress.request("r1").resume
    assert (list(asked.tokens), asked.seed, asked.revision) == ([1, 2, 3], 7, "r1")


def test_an_answer_that_is_whole_needs_nobody():
    progress = Progress(generate())
    progress.take(message())
    assert not progress.finished
    progress.take(message(finish_reason=pb.FINISH_REASON_STOP))
    assert progress.finished


def test_text_without_tokens_cannot_be_taken_up():
    progress = Progress(generate())
    progress.take(message(tokens=()))
    assert not progress.resumable
    assert not Progress(pb.TokenizeRequest(text="a")).resumable


def test_patience_begins_anew_with_every_token():
    trials = Trials(began=0.0, patience_s=10.0)
    trials = trials.after("a", progressed=False, now=6.0).after("b", progressed=False, now=9.0)
    assert (trials.attempts, trials.tried, trials.left_s(9.0)) == (2, {"a", "b"}, 1.0)
    assert replay_after_s(trials, 9.0) is not None
    assert replay_after_s(trials, 10.0) is None
    trials = trials.after("c", progressed=True, now=9.5)
    assert (trials.attempts, trials.tried, trials.left_s(9.5)) == (1, {"c"}, 10.0)
    assert trials.all_over().tried == frozenset()


def scored(*tokens, **more):
    prompt = [pb.PromptToken(token=token, logprob=-1) for token in tokens]
    return pb.GenerateResponse(prompt=prompt, **more).SerializeToString()


def test_scores_of_a_prompt_are_sent_once_however_many_replicas_compute_them():
    progress = Progress(generate(prompt_logprobs=1, temperature=1.0))
    progress.request("r1")
    assert progress.take(scored(1, 2, 3)) == [scored(1, 2, 3)]
    assert progress.bound_to == "r1"
    progress.request("r1")
    passed = [
        *progress.take(scored(1, 2)),
        *progress.take(scored(3, 4)),
        *progress.take(scored(5, tokens=[9])),
    ]
    found = [pb.GenerateResponse.FromString(message) for message in passed]
    assert [token.token for response in found for token in response.prompt] == [4, 5]
    assert list(progress.request("r1").resume.tokens) == [9]
    assert progress.take(message(finish_reason=pb.FINISH_REASON_STOP))


def test_scores_for_which_nobody_asked_break_the_contract():
    progress = Progress(generate())
    progress.request("")
    with pytest.raises(ContractError, match="tokens of the prompt, for which nobody asked"):
        progress.take(scored(1))
