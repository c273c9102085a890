"""Names of blocks of prompts: equal for frontends and workers, apart for clients."""

from hypothesis import given
from hypothesis import strategies as st

from moe_api.inference.v1 import inference_pb2
from moe_api.prefixes import BLOCK_BYTES, BLOCK_TOKENS, BLOCKS_MOST, ends_of, names_of


def text(prompt, **fields):
    return inference_pb2.GenerateRequest(prompt=prompt, **fields)


def tokens(count):
    return inference_pb2.GenerateRequest(prompt_tokens={"ids": range(count)})


def test_a_name_is_of_a_block_and_all_that_is_before_it():
    first, second, third = "a" * 512, "b" * 512, "c" * 512
    assert len(names_of(text(first + second + "rest"), "s")) == 2
    assert names_of(text(first + third), "s")[0] == names_of(text(first + second), "s")[0]
    assert names_of(text(first + third), "s")[1] != names_of(text(second + third), "s")[1]
    assert not set(names_of(text(first + second), "s")) & set(names_of(text(first + second), "t"))


def test_requests_whose_tokens_differ_have_other_names():
    prompt = "a" * 512
    without = text(prompt, without_special_tokens=True)
    as_tokens = inference_pb2.GenerateRequest(prompt_tokens={"ids": [ord("a")] * 512})
    assert not set(names_of(text(prompt), "")) & set(names_of(without, ""))
    assert not set(names_of(text(prompt), "")) & set(names_of(as_tokens, ""))


def test_a_prompt_has_a_bounded_number_of_blocks():
    assert len(names_of(tokens(300), "s")) == 2
    assert len(names_of(tokens(BLOCK_TOKENS * BLOCKS_MOST + 5000), "s")) == BLOCKS_MOST
    assert len(names_of(text("x" * (BLOCK_BYTES * BLOCKS_MOST + 5000)), "s")) == BLOCKS_MOST
    assert ends_of(tokens(300), range(300), bytes) == (128, 256)


@given(st.lists(st.integers(1, 900), max_size=60), st.binary(max_size=3))
def test_a_block_ends_with_the_token_that_has_its_last_byte(sizes, lost):
    """`lost`: bytes that the tokenizer took away, as normalizers do."""
    request = text("x" * (sum(sizes) + len(lost)))
    ends = ends_of(request, range(len(sizes)), lambda token: b"x" * sizes[token])
    assert len(ends) == len(names_of(request, "")) or not sizes
    assert list(ends) == sorted(ends)
    for number, end in enumerate(ends, 1):
        if sum(sizes) >= number * BLOCK_BYTES:
            assert sum(sizes[: end - 1]) < number * BLOCK_BYTES <= sum(sizes[:end])
        else:
            assert end == len(sizes)
