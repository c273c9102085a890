"""OpenAI's API before a real worker with a tiny random model: tokens as of transformers and the engine."""

import json

import openai
import pytest
from transformers import AutoTokenizer

import moe_worker
from tests.checkpoints import write_checkpoint
from tests.worker.serving import Worker

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = write_checkpoint(
        tmp_path_factory.mktemp("chat"), max_position_embeddings=512, eos_token_id=None
    )
    config = {
        "chat_template": TEMPLATE,
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "add_bos_token": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def tiny(checkpoint):
    with Worker(checkpoint, "--device", "cpu", "--dtype", "float32") as worker:
        worker.wait_ready()
        yield worker


@pytest.fixture
async def client(tiny, command):
    await command("--static", f"127.0.0.1:{tiny.port}", "--http", "127.0.0.1:0")
    async with openai.AsyncOpenAI(base_url=f"http://{command.http}/v1", api_key="unused") as client:
        yield client


async def test_a_chat_is_what_the_engine_makes_of_the_tokens_of_transformers(client, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    engine = moe_worker.Engine(checkpoint, device="cpu", dtype="float32")
    (expected,) = engine.generate([ids], moe_worker.SamplingParameters(max_tokens=24))
    asked = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0}
    answer = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(ids)
    found = answer.choices[0].logprobs.content
    assert len(found) == answer.usage.completion_tokens == 24
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in found)
    stream = await client.chat.completions.create(**asked, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == expected.text


async def test_a_completion_of_the_same_tokens_is_the_same_text_and_comes_from_the_cache(client, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    others = [{"role": "user", "content": "jumps over the lazy dog"}] * 4
    ids = tokenizer.apply_chat_template(others, add_generation_prompt=True, return_dict=False)
    first, second = [
        await client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
        for _ in range(2)
    ]
    assert first.choices[0].text == second.choices[0].text
    assert first.usage.prompt_tokens == len(ids)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.usage.prompt_tokens_details.cached_tokens < len(ids)


async def test_seeds_and_errors_of_the_real_worker(client):
    drawn = [
        (await client.completions.create(model="tiny", prompt="the", max_tokens=12, n=2, seed=5)).choices
        for _ in range(2)
    ]
    assert [choice.text for choice in drawn[0]] == [choice.text for choice in drawn[1]]
    assert drawn[0][0].text != drawn[0][1].text
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served here"):
        await client.completions.create(model="other", prompt="the")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="the", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "the " * 9000}]
        )
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    # Few enough characters that the frontend cannot tell; the worker counts tokens.
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt=" q z" * 300)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
