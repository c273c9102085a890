"""OpenAI's API before a real worker with a tiny random model: tokens as of transformers and the engine."""

import asyncio
import json
import urllib.request

import grpc
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_worker
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
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


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")


def parsed(answer, context_lengths):
    """Sum of log-probabilities and greediness of each continuation, as lm-eval's local-completions read them.

    Of one generated token, which it asks for and drops.
    """
    found = []
    for choice, length in zip(
        sorted(answer.choices, key=lambda one: one.index), context_lengths, strict=True
    ):
        logprobs = choice.logprobs.token_logprobs[length:-1]
        likely = choice.logprobs.top_logprobs[length:-1]
        greedy = all(logprob == max(top.values()) for logprob, top in zip(logprobs, likely, strict=True))
        found.append((sum(logprobs), greedy))
    return found


async def test_prompts_are_scored_as_lm_eval_asks_for_it(client, model):
    prompts = [[0, *range(5, 90)], [0, 7, 8, 9], [0, *range(5, 70)]]
    lengths = [40, 2, 60]
    with torch.inference_mode():
        best = model(torch.tensor([prompts[1]])).logits[0, -1].argmax().item()
    prompts[1].append(best)
    lengths[1] = 4
    answer = await client.completions.create(
        model="tiny", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, echo=True, seed=1234
    )
    with torch.inference_mode():
        for prompt, length, (total, greedy) in zip(prompts, lengths, parsed(answer, lengths), strict=True):
            rows = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)[length - 1 :]
            wanted = torch.tensor(prompt[length:])
            assert total == pytest.approx(rows.gather(1, wanted.unsqueeze(1)).sum().item(), abs=1e-3)
            assert greedy == bool((rows.argmax(-1) == wanted).all())
    assert [greedy for _, greedy in parsed(answer, lengths)] == [False, True, False]
    (text,) = (
        await client.completions.create(
            model="tiny", prompt="the lazy dog", max_tokens=0, logprobs=0, echo=True
        )
    ).choices
    assert text.text == "the lazy dog"
    assert "".join(text.logprobs.tokens[1:]) == "the lazy dog"
    assert text.logprobs.token_logprobs[0] is None


def watched(http, what):
    """What the frontend knows of the workers' caches."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = [line for line in lines if line.startswith(f"moe_frontend_watched_caches_{what}")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


async def until_watched(http, what, wanted):
    async with asyncio.timeout(60):
        while watched(http, what) != wanted:
            await asyncio.sleep(0.02)


async def test_a_prompt_goes_to_the_worker_that_holds_it_whoever_sent_it(tiny, checkpoint, command):
    """Prompts reach two workers directly, so the frontend knows of them by WatchCache alone."""
    prompts = [[7 + index * (number + 1) % 100 for index in range(270)] for number in range(6)]
    with Worker(checkpoint, "--device", "cpu", "--dtype", "float32") as other:
        other.wait_ready()
        static = ",".join(f"127.0.0.1:{worker.port}" for worker in (tiny, other))
        routing = ("--routing", "prefix-affinity-exact")
        _, address = await command("--static", static, "--http", "127.0.0.1:0", *routing)
        await until_watched(command.http, "replicas", 2)
        before = watched(command.http, "blocks")
        for prompt, worker in zip(prompts, (tiny, tiny, other, other, tiny, other), strict=True):
            list(worker.inference.Generate(asked(prompt), timeout=60))
        await until_watched(command.http, "blocks", before + 2 * len(prompts))
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for prompt in prompts:
                answer = [message async for message in stub.Generate(asked([*prompt, 9]))]
                assert answer[-1].usage.cached_tokens >= 256


def asked(ids):
    return inference_pb2.GenerateRequest(prompt_tokens={"ids": ids}, sampling={"max_tokens": 1})
