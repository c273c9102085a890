"""Messages between the edge and the engine process arrive as they were sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_worker import framing
from moe_worker.config import EngineOptions
from moe_worker.engine.requests import Delta, FinishReason, Load, Request
from moe_worker.engine.statistics import (
    DomainExperts,
    Event,
    EventKind,
    ExpertStatistics,
    LayerExperts,
    Statistics,
)
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service import wire

NUMBERS = st.integers(0, 2**64 - 1)
TEXTS = st.text(max_size=20)
LOADS = st.builds(Load, *[NUMBERS] * 5)
STATISTICS = st.builds(Statistics, *[NUMBERS] * len(Statistics._fields))
EVENTS = st.builds(Event, NUMBERS, st.sampled_from(EventKind), NUMBERS)
# Named fields only: hypothesis would choose the others by their types, and NaN is equal to nothing.
LOADS_OF_RANKS = st.lists(st.floats(0, 1e12), max_size=3).map(tuple)
LAYERS = st.builds(LayerExperts, NUMBERS, st.lists(NUMBERS, max_size=3).map(tuple), NUMBERS, LOADS_OF_RANKS)
SHARES = st.lists(st.lists(st.floats(0, 1), max_size=3).map(tuple), max_size=2).map(tuple)
DOMAINS = st.builds(DomainExperts, TEXTS, NUMBERS, SHARES)
EXPERTS = st.builds(
    ExpertStatistics,
    NUMBERS,
    st.lists(LAYERS, max_size=3).map(tuple),
    st.lists(DOMAINS, max_size=2).map(tuple),
    st.none() | st.floats(0, 1),
)
SAMPLING = st.builds(
    SamplingParameters,
    max_tokens=NUMBERS,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=NUMBERS,
    seed=st.none() | NUMBERS,
    stop=st.lists(TEXTS, max_size=3).map(tuple),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(NUMBERS, st.floats(-100, 100), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    stop_token_ids=st.lists(NUMBERS, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    min_tokens=NUMBERS,
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
TOKENS = st.lists(NUMBERS).map(tuple)
REQUESTS = st.builds(Request, NUMBERS, TOKENS, SAMPLING, NUMBERS, written=TOKENS)
FLOATS = st.floats(-100, 0) | st.just(float("-inf"))
LOGPROBS = st.builds(TokenLogprobs, FLOATS, st.lists(st.tuples(NUMBERS, FLOATS), max_size=2).map(tuple))
REASONS = st.none() | st.sampled_from(FinishReason)
SCORES = st.lists(LOGPROBS, max_size=2).map(tuple)
DELTAS = st.builds(Delta, NUMBERS, TEXTS, st.none() | NUMBERS, REASONS, st.none() | LOGPROBS, SCORES)
MESSAGES = st.one_of(
    st.builds(wire.Start, TEXTS, st.builds(EngineOptions, kv_memory=st.none() | st.integers(1, 2**50))),
    st.builds(wire.Submit, REQUESTS),
    st.builds(wire.Refused, NUMBERS, TEXTS, st.booleans()),
    st.builds(wire.Cancel, NUMBERS),
    st.builds(wire.Loaded, TEXTS, LOADS, NUMBERS),
    st.builds(wire.Failed, TEXTS, st.integers(0, 255)),
    st.just(wire.AskExperts()),
    st.builds(wire.ExpertReport, EXPERTS),
    st.builds(
        wire.Stepped,
        NUMBERS,
        NUMBERS,
        st.lists(DELTAS, max_size=3).map(tuple),
        LOADS,
        NUMBERS,
        STATISTICS,
        st.lists(EVENTS, max_size=3).map(tuple),
    ),
)


@given(MESSAGES)
def test_a_message_survives_the_wire(message):
    frame = wire.encode(message)
    assert int.from_bytes(frame[: framing.LENGTH_BYTES], "big") == len(frame) - framing.LENGTH_BYTES
    assert wire.decode(frame[framing.LENGTH_BYTES :]) == message


@given(MESSAGES, st.integers(0, 2**20))
def test_a_cut_message_is_refused(message, cut):
    payload = wire.encode(message)[framing.LENGTH_BYTES :]
    with pytest.raises(framing.MalformedMessageError):
        wire.decode(payload[: cut % len(payload)])


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_refused(payload):
    try:
        message = wire.decode(payload)
    except framing.MalformedMessageError:
        return
    assert isinstance(message, wire.Message)
