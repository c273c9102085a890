"""`moe chat` against a real frontend."""

import dataclasses

import pytest

from moe_frontend.discovery.endpoints import Served
from tests.frontend.chat.templates import QWEN3
from tests.frontend.conftest import bench  # noqa: F401 - a fixture
from tests.frontend.http.conftest import http  # noqa: F401 - a fixture


@pytest.fixture
async def talking(http, moe):  # noqa: F811
    """`await talking(says, *args)` runs the command; `talking.asked` are the prompts."""
    h = await http(workers=1)
    worker = h.bench.workers[0]
    served = Served("m", 4096, template=QWEN3)
    h.bench.replicas.update(frozenset({dataclasses.replace(worker.endpoint, served=served)}))

    async def run(says, *args, stdin=b""):
        worker.says = says
        return await moe("chat", *args, stdin=stdin, MOE_ENDPOINT=h.bench.address)

    run.asked = worker.asked
    return run


async def test_one_message_is_answered(talking):
    done = await talking(
        ["<think>\nhm</think>\n\nHi", " there\x1b[2J"], "Hello", "--max-tokens", "9", "--seed", "3"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"Hi there\x1b[2J\n"  # a pipe gets what the model wrote
    (request,) = talking.asked
    assert request.prompt.endswith("user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert (request.sampling.max_tokens, request.sampling.seed) == (9, 3)


async def test_a_conversation_goes_on_line_by_line(talking):
    done = await talking(
        ["<think>so</think>", "Yes"], "--system", "Be brief.", "--show-reasoning", stdin=b"One\n\nTwo\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Yes\nYes\n", b"soso")
    assert "system\nBe brief." in talking.asked[1].prompt
    assert "user\nOne<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n" in talking.asked[1].prompt


async def test_no_thinking_reaches_the_template(talking):
    await talking(["x"], "Hello", "--no-thinking")
    assert talking.asked[0].prompt.endswith("<think>\n\n</think>\n\n")


async def test_errors_are_sentences_with_exit_codes(talking, moe):
    done = await talking(["x"], "Hello", "--endpoint", "nowhere")
    assert done.returncode == 2
    done = await moe("chat", "Hello", "--endpoint", "127.0.0.1:1")
    assert done.returncode == 3
    assert b"cannot connect to 127.0.0.1:1" in done.stderr
    done = await talking(["x"], "x" * 100_000, "--temperature", "1.5")
    assert done.returncode == 0
