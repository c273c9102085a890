"""Calls that tool_choice forces: a random model makes them, in each model's own form."""

import json

import jsonschema
import openai
import pytest

import moe_worker
from moe_api import lengths
from moe_frontend.chat.parsing import Parser, tool_format, unformatted
from moe_frontend.discovery.endpoints import Served
from moe_frontend.http.bodies import decode
from moe_frontend.http.chats import requests
from moe_frontend.http.conversation import conversation
from moe_frontend.http.errors import ApiError
from moe_frontend.http.schemas import ChatRequest
from moe_worker.service.validation import _output_format
from tests.checkpoints import write_checkpoint
from tests.frontend.chat.templates import DEEPSEEK_R1, DEEPSEEK_V31, QWEN3
from tests.frontend.http.test_chats import USER, chat, chatting
from tests.worker.serving import Worker

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
TEMPLATES = {"qwen3": QWEN3, "deepseek-r1": DEEPSEEK_R1, "deepseek-v3.1": DEEPSEEK_V31}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("tools"), max_position_embeddings=2048)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": QWEN3}))
    return directory


@pytest.fixture(scope="module")
def engine(checkpoint):
    return moe_worker.Engine(checkpoint, threads=1)


def wanted(template, choice, prompt="", **fields):
    """The format of the text of a request."""
    body = {"messages": [USER], "tools": TOOLS, "tool_choice": choice, **fields}
    request = decode(json.dumps(body).encode(), ChatRequest)
    served = Served("m", 2048, template=template)
    talk = conversation(request, served)
    (asked,) = requests(request, served, talk, prompt)
    return asked


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_texts_are_calls_that_the_parser_reads(engine, template):
    for prompt, thought in (("x", "<think>\nhm\n</think>"), ("x</think>", "")):
        asked = wanted(template, "required", prompt)
        assert asked.output_format.after == unformatted(reasons=True, prompt=prompt)
        asked.output_format.after = ""  # a random model would never write it
        result = finished(engine, asked)
        piece = Parser(True, tool_format(template), prompt).take(thought + result.text, last=True)
        assert piece.calls
        assert piece.content == ""
        for call in piece.calls:
            schema = WEATHER if call.name == "weather" else {"type": "object", "maxProperties": 0}
            jsonschema.validate(json.loads(call.arguments), schema)


def finished(engine, asked):
    """A text of the random model that ends; some are white space up to the last token."""
    for seed in range(8):
        sampling = moe_worker.SamplingParameters(max_tokens=900, temperature=1.5, seed=seed)
        (result,) = engine.generate(["x"], sampling, _output_format(asked))
        if result.finish_reason == "stop":
            return result
    raise AssertionError("none of eight texts ended")


def test_a_named_function_is_called_once(engine):
    for fields in ({"choice": NAMED}, {"choice": "required", "parallel_tool_calls": False}):
        for seed in range(2):
            asked = wanted(QWEN3, prompt="</think>", **fields)
            sampling = moe_worker.SamplingParameters(max_tokens=900, temperature=1.5, seed=seed)
            (result,) = engine.generate(["x"], sampling, _output_format(asked))
            calls = Parser(False, tool_format(QWEN3), "").take(result.text, last=True).calls
            assert len(calls) == 1
            assert calls[0].name in ("weather", "now" if fields["choice"] == "required" else "weather")


async def test_openais_client_gets_forced_calls_of_a_real_worker(checkpoint, command):
    with Worker(checkpoint, "--dtype", "float32") as worker:
        worker.wait_ready()
        await command("--static", f"127.0.0.1:{worker.port}", "--http", "127.0.0.1:0")
        async with openai.AsyncOpenAI(base_url=f"http://{command.http}/v1", api_key="unused") as client:
            asked = {
                "model": "tiny",
                "messages": [USER],
                "tools": TOOLS,
                "max_completion_tokens": 1000,
                "temperature": 1.5,
                "seed": 3,
                "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
            }
            for choice in ("required", NAMED):
                answer = await client.chat.completions.create(**asked, tool_choice=choice)
                (one,) = answer.choices
                assert one.finish_reason == "tool_calls"
                assert one.message.content is None
                for call in one.message.tool_calls:
                    if call.function.name == "weather":
                        jsonschema.validate(json.loads(call.function.arguments), WEATHER)
                async with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
                    final = await stream.get_final_completion()
                assert [c.function.arguments for c in final.choices[0].message.tool_calls] == [
                    c.function.arguments for c in one.message.tool_calls
                ]
            unsupported = {"name": "f", "parameters": {"type": "object", "not": {}}}
            with pytest.raises(openai.BadRequestError, match="not supported") as caught:
                await client.chat.completions.create(
                    **asked | {"tools": [{"type": "function", "function": unsupported}]},
                    tool_choice="required",
                )
            assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"tools": TOOLS, "tool_choice": NAMED | {"function": {"name": "other"}}},
            "tool_choice",
            "names 'other'",
        ),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "always"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "allowed_tools"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "excludes",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a\\n```"}}], "tool_choice": "required"},
            "tools",
            "of which a call cannot be forced",
        ),
    ],
)
async def test_what_cannot_be_forced_is_refused_by_name(http, fields, param, sentence):
    h = await chatting(http)
    response = await chat(h, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert sentence in response.json()["error"]["message"]


def test_schemas_together_are_bounded():
    large = [
        {"type": "function", "function": {"name": f"f{n}", "parameters": {"description": "x" * 1000}}}
        for n in range(128)
    ]
    asked = wanted(QWEN3, "required", tools=large)
    assert any(problem for _, problem in lengths.of_output_format(asked.output_format))
    with pytest.raises(ApiError, match="names 'missing'"):
        wanted(QWEN3, NAMED | {"function": {"name": "missing"}})
