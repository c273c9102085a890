"""Token bytes become text that can be sent: whole characters, nothing of a stop text."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moe_worker.config import read_checkpoint_config
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.sampling.text import TextStream

# A small alphabet makes stop texts meet; it has characters of 1 to 4 bytes, and bytes that are none.
TEXTS = st.text(alphabet="abé日🙂", max_size=30)
STOPS = st.lists(st.text(alphabet="abé日🙂", min_size=1, max_size=4), max_size=3)
JUNK = st.binary(max_size=3)


def cut(data, lengths):
    """`data` in pieces of these lengths, and the rest."""
    pieces, start = [], 0
    for length in lengths:
        pieces.append(data[start : start + length])
        start += length
    return [*pieces, data[start:]]


def stream(pieces, stops=()):
    text = TextStream(stops)
    deltas = [text.push(piece) for piece in pieces]
    return [*deltas, text.finish()], text.stopped


def before_first_stop(text, stops):
    """What is left of `text` before the stop that is complete first (the longest of several)."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text
    end, length = min(ends)
    return text[: end + length]


@given(
    st.lists(st.one_of(TEXTS.map(str.encode), JUNK), max_size=5).map(b"".join), st.lists(st.integers(0, 4))
)
def test_joined_deltas_are_the_decoded_bytes_however_they_are_cut(data, lengths):
    deltas, stopped = stream(cut(data, lengths))
    assert "".join(deltas) == data.decode(errors="replace")
    assert not stopped


@given(TEXTS, st.lists(st.integers(0, 4)))
def test_no_delta_splits_a_character(text, lengths):
    deltas, _ = stream(cut(text.encode(), lengths))
    assert "\ufffd" not in "".join(deltas)


@given(TEXTS, STOPS, st.lists(st.integers(0, 4)))
def test_text_ends_before_the_first_stop_and_none_of_it_is_sent(text, stops, lengths):
    deltas, stopped = stream(cut(text.encode(), lengths), stops)
    assert "".join(deltas) == before_first_stop(text, stops)
    assert stopped == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_text_is_held_back():
    text = TextStream(["END"])
    assert text.push(b"the E") == "the "
    assert text.push(b"N") == ""
    assert text.push(b"tity") == "ENtity"


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.load(checkpoint, read_checkpoint_config(checkpoint))


@given(text=TEXTS)
def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()


@given(ids=st.lists(st.integers(0, 319), max_size=20))
def test_bytes_of_any_tokens_decode_as_the_library_does(tokenizer, checkpoint, ids):
    library = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ours = b"".join(tokenizer.token_bytes(token) for token in ids).decode(errors="replace")
    assert ours == library.decode(ids, skip_special_tokens=True)


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer):
    """The library's `encode` would hold them up to its end: probes of the worker went unanswered."""
    text, ticks = "the quick brown fox " * 50_000, []
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(tokenizer.encode, text)
        while not encoding.done():
            ticks.append(time.monotonic())
            time.sleep(0.001)
    assert len(ticks) > 20


def test_begin_of_text_comes_first_only_where_asked_for(tokenizer):
    assert tokenizer.encode("hi") == [0, *tokenizer.encode("hi", add_special_tokens=False)]
