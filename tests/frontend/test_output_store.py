"""Keys and stored answers, against models."""

import random
import time
import tracemalloc
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moe_api.inference.v1 import inference_pb2
from moe_frontend.outputs.answer import answer_of
from moe_frontend.outputs.key import key_of
from moe_frontend.outputs.store import Store

STOP = inference_pb2.FINISH_REASON_STOP
LONG = (pytest.mark.slow, pytest.mark.timeout(1200))


def stored(text, tokens=(1, 2, 3)):
    message = inference_pb2.GenerateResponse(text=text, tokens=tokens, finish_reason=STOP)
    return answer_of([message.SerializeToString()])


def greedy(prompt="x"):
    return inference_pb2.GenerateRequest(prompt=prompt, sampling={"temperature": 0})


SAMPLING = {
    "max_tokens": (1, 2),
    "temperature": (0.0, 0.5),
    "top_p": (0.5, 1.0),
    "top_k": (0, 3),
    "seed": (0, 1),
    "stop": (["a"], ["a", "b"], ["ab"]),
    "min_p": (0.0, 0.1),
    "repetition_penalty": (1.0, 1.1),
    "presence_penalty": (0.0, 1.0),
    "frequency_penalty": (0.0, 1.0),
    "logit_bias": ({1: 1.0}, {1: 2.0}, {2: 1.0}),
    "stop_token_ids": ([1], [1, 2], [12]),
    "ignore_eos": (True,),
    "min_tokens": (0, 1),
    "logprobs": (0, 1),
}


def test_a_long_answer_takes_time_in_proportion_to_its_length():
    message = inference_pb2.GenerateResponse(text="abcd ", tokens=[1]).SerializeToString()
    last = inference_pb2.GenerateResponse(finish_reason=STOP).SerializeToString()
    began = time.process_time()
    assert answer_of([message] * 80_000 + [last]) is not None
    assert time.process_time() - began < 5  # 18 s if each message copies the text so far


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=LONG)])
def test_every_field_of_a_request_is_in_its_key(count):
    """Random requests: keys are equal exactly where all fields are."""
    chance, seen = random.Random(1), {}
    known = {field.name for field in inference_pb2.SamplingParameters.DESCRIPTOR.fields}
    # Scores of prompts are never stored.
    assert known - {"prompt_logprobs"} == set(SAMPLING), "a new sampling field: add values for it here"
    for _ in range(count):
        sampling = {name: chance.choice(SAMPLING[name]) for name in chance.sample(sorted(SAMPLING), 5)}
        sampling.setdefault("seed", 7)
        number = chance.randrange(count)
        prompt = chance.choice(
            ({"prompt": "12"}, {"prompt": f"1{number}"}, {"prompt_tokens": {"ids": [1, number]}})
        )
        model, salt, revision = chance.choice("ab"), chance.choice("ab"), chance.choice(("r1", "r2"))
        request = inference_pb2.GenerateRequest(model=model, sampling=sampling, **prompt)
        key = key_of(request, [("x-cache-salt", salt)], revision, samples=False)
        # 16 bytes for each of a million requests; equal digests of other texts would fail here, not pass.
        identity = blake2b(
            repr((model, salt, revision, prompt, sorted(sampling.items()))).encode(), digest_size=16
        ).digest()
        assert seen.setdefault(key, identity) == identity
    assert len(set(seen.values())) == len(seen) > 0.9 * count


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=LONG)])
def test_memory_stays_within_the_limit(count):
    """Short answers, of which the objects around the text are most; measured by Python's allocator."""
    limit = 300 * count // 4
    tracemalloc.start()
    try:
        store = Store(limit, 3600.0)
        store.serve(frozenset(("r",)))
        before, most = tracemalloc.get_traced_memory()[0], 0
        for number in range(count):
            store.put(number.to_bytes(32), stored("x" * (number % 200)), "r")
            if not number % 500:
                most = max(most, tracemalloc.get_traced_memory()[0] - before)
        assert store.evictions["", "capacity"] > count / 2
        assert 0.5 * limit < most <= 1.01 * limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("sampling", "samples", "cacheable"),
    [
        ({"temperature": 0}, True, True),
        ({}, False, True),
        ({}, True, False),
        ({"temperature": 0.1}, False, False),
        ({"temperature": 0.1, "seed": 0}, False, True),
    ],
)
def test_only_determined_answers_are_cacheable(sampling, samples, cacheable):
    request = inference_pb2.GenerateRequest(prompt="x", sampling=sampling)
    assert (key_of(request, (), "r", samples=samples) is not None) == cacheable


def test_no_key_without_a_revision_or_for_another_one():
    other = greedy()
    other.resume.revision = "r2"
    assert key_of(greedy(), (), "", samples=False) is None
    assert key_of(other, (), "r1", samples=False) is None


def test_the_seed_of_a_stream_counts_like_one_of_the_request():
    streamed = inference_pb2.GenerateRequest(prompt="x", sampling={"temperature": 1}, resume={"seed": 3})
    seeded = inference_pb2.GenerateRequest(prompt="x", sampling={"temperature": 1, "seed": 3})
    assert key_of(streamed, (), "r", samples=False) == key_of(seeded, (), "r", samples=False)


PIECES = st.lists(
    st.tuples(st.text(max_size=3), st.lists(st.integers(0, 99), min_size=1, max_size=3)), min_size=1
)


@given(PIECES, st.data())
def test_an_answer_goes_on_behind_every_message_and_nowhere_else(pieces, data):
    messages = [
        inference_pb2.GenerateResponse(text=text, tokens=tokens, logprobs=[{"logprob": -1.0}] * len(tokens))
        for text, tokens in pieces
    ]
    messages[-1].finish_reason = STOP
    answer = answer_of([message.SerializeToString() for message in messages])
    cut = data.draw(st.integers(0, len(pieces)))
    sent = [token for _, tokens in pieces[:cut] for token in tokens]
    rest = inference_pb2.GenerateResponse.FromString(answer.behind(sent))
    assert rest.text == "".join(text for text, _ in pieces[cut:])
    assert list(rest.tokens) == [token for _, tokens in pieces[cut:] for token in tokens]
    assert len(rest.logprobs) == len(rest.tokens)
    assert answer.behind([*sent[:-1], 1000]) is None


def test_an_answer_without_an_end_is_not_stored():
    assert answer_of([inference_pb2.GenerateResponse(text="a", tokens=[1]).SerializeToString()]) is None


QUESTION = {
    "tenant": st.sampled_from(("a", "b")),
    "prompt": st.sampled_from(("p", "q")),
    "seed": st.integers(0, 2),
    "revision": st.sampled_from(("r1", "r2")),
}


class Model(RuleBasedStateMachine):
    """A dictionary says which answer belongs to a key; the store gives that one or none."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.memory = 6000
        self.store = Store(self.memory, 10.0, lambda: self.now)
        self.served = frozenset(("r1",))
        self.store.serve(self.served)
        self.answers = {}
        self.stored_at = {}

    def key(self, tenant, prompt, seed, revision):
        request = inference_pb2.GenerateRequest(prompt=prompt, sampling={"seed": seed})
        return key_of(request, [("authorization", tenant)], revision, samples=True)

    @rule(**QUESTION, size=st.integers(0, 5000))
    def put(self, tenant, prompt, seed, revision, size):
        key = self.key(tenant, prompt, seed, revision)
        held = key in self.store._entries  # it may have been evicted since it was stored
        self.store.put(key, stored(f"{tenant}{prompt}{seed}{revision}" + "." * size), revision)
        self.answers.setdefault(key, (f"{tenant}{prompt}{seed}{revision}", revision))
        if revision in self.served and not held:
            self.stored_at[key] = self.now

    @rule(**QUESTION)
    def get(self, tenant, prompt, seed, revision):
        key = self.key(tenant, prompt, seed, revision)
        found = self.store.get(key)
        if found is None:
            self.stored_at.pop(key, None)
            return
        response = inference_pb2.GenerateResponse.FromString(found.behind(()))
        assert response.text.rstrip(".") == f"{tenant}{prompt}{seed}{revision}"
        assert revision in self.served
        assert self.now - self.stored_at[key] < 10

    @rule(revisions=st.sets(st.sampled_from(("r1", "r2")), min_size=1))
    def roll_out(self, revisions):
        self.served = frozenset(revisions)
        self.store.serve(self.served)
        self.stored_at = {
            key: at for key, at in self.stored_at.items() if self.answers[key][1] in self.served
        }

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def memory_is_bounded(self):
        assert 0 <= self.store.bytes <= self.memory
        assert (self.store.bytes == 0) == (len(self.store) == 0)


TestStore = Model.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_answer_is_what_a_client_would_make_of_the_messages():
    """A message without text repeats none, and what is said of a stream only is left out."""
    messages = [
        inference_pb2.GenerateResponse(text="ab", tokens=[1, 2], resumed=3),
        inference_pb2.GenerateResponse(tokens=[3]),
        inference_pb2.GenerateResponse(text="c", tokens=[4]),
        inference_pb2.GenerateResponse(
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(prompt_tokens=7, completion_tokens=4),
        ),
    ]
    newer = b"\xf8\x3f\x01"  # field 127
    answer = answer_of([message.SerializeToString() + newer for message in messages])
    assert inference_pb2.GenerateResponse.FromString(answer.payload) == inference_pb2.GenerateResponse(
        text="abc",
        tokens=[1, 2, 3, 4],
        finish_reason=inference_pb2.FINISH_REASON_STOP,
        usage=inference_pb2.Usage(prompt_tokens=7, completion_tokens=4, cached=True),
    )
    assert list(answer.marks) == [2, 2, 3, 2, 4, 3, 4, 3]
