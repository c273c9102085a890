import io

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.errors import DataError
from moe_worker.train import data


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\0two\n\nstill two\0", ["one", "two\n\nstill two"]),
        ("one\n\ntwo\nstill two\n\n\n", ["one", "two\nstill two"]),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_documents_stand_between_nul_bytes_or_else_between_blank_lines(
    tmp_path, content, documents, compressed
):
    path = tmp_path / ("text.zst" if compressed else "text.txt")
    path.write_bytes(zstandard.compress(content.encode()) if compressed else content.encode())
    assert [document.strip("\n") for document in data.read_documents(path)] == documents


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"abc\xff", "byte 3 is not UTF-8"),
        ("a.txt.zst", b"abc", "is not a Zstandard file"),
        ("a.txt.zst", zstandard.compress(bytes(range(128)) * 99)[:-9], "ends in the middle"),
        ("a.txt", b"\n\n \n\n", "holds no text"),
    ],
)
def test_unusable_text_is_refused_with_file_and_reason(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as raised:
        data.read_documents(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        data.read_documents(tmp_path / "none.txt")


def test_a_vocabulary_without_room_for_every_byte_is_refused():
    with pytest.raises(DataError, match="ask for 258 or more"):
        data.train_tokenizer(["text"], 100)


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["the page of memory that the driver maps\n    indented\n"] * 3, 300)


@given(text=st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_every_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode()


def test_an_encoded_text_begins_with_the_begin_of_text_token(tokenizer):
    assert tokenizer.encode("the page").ids[0] == tokenizer.token_to_id(data.BEGIN_OF_TEXT) == data.BOS_ID


@given(
    length=st.integers(60, 400),
    window=st.integers(2, 9),
    batch=st.integers(1, 4),
    seed=st.integers(0, 99),
    number=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_pass_shows_no_token_twice_and_targets_follow_inputs(length, window, batch, seed, number):
    sampler = data.WindowSampler(torch.arange(length), window, batch, seed)
    first = number * sampler.steps_per_pass
    batches = [sampler.at(first + step) for step in range(sampler.steps_per_pass)]
    seen = torch.cat([inputs.flatten() for inputs, _ in batches])
    assert len(seen.unique()) == len(seen) >= length - (2 + batch) * window - 1
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (batch, window)
        assert torch.equal(targets, inputs + 1)


def test_passes_differ_and_the_same_step_is_always_the_same():
    sampler = data.WindowSampler(torch.arange(1000), 10, 4, seed=3)
    again = data.WindowSampler(torch.arange(1000), 10, 4, seed=3)
    assert torch.equal(sampler.at(57)[0], again.at(57)[0])
    assert not torch.equal(sampler.at(0)[0], sampler.at(sampler.steps_per_pass)[0])


def test_too_little_text_for_a_batch_is_refused():
    with pytest.raises(DataError, match="too few for a batch of 8 windows of 64 tokens"):
        data.WindowSampler(torch.arange(100), 64, 8, seed=0)


def test_documents_are_joined_between_their_begin_and_end():
    joined = data.join_documents([np.array([5, 6], np.int32), np.array([7], np.int32)])
    assert joined.tolist() == [0, 5, 6, 1, 0, 7, 1]


def test_zstandard_frames_of_unknown_size_are_read(tmp_path):
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        writer.write(b"streamed text")
    path = tmp_path / "text.zst"
    path.write_bytes(buffer.getvalue())
    assert data.read_documents(path) == ["streamed text"]


@settings(max_examples=20)
@given(documents=st.lists(st.text(max_size=30), max_size=12), together=st.integers(1, 40))
def test_documents_are_encoded_in_batches_as_one_by_one(tokenizer, documents, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ENCODED_TOGETHER", together)
        tokens = data.encode_documents(tokenizer, documents)
    assert [found.tolist() for found in tokens] == [
        tokenizer.encode(document, add_special_tokens=False).ids for document in documents
    ]
