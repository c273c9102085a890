"""ChatService: conversations over gRPC mean what they mean over HTTP."""

import dataclasses

import grpc
import pytest

from moe_api import rich_status
from moe_api.inference.v1 import chat_pb2, chat_pb2_grpc, inference_pb2
from moe_frontend.discovery.endpoints import Served
from tests.frontend.chat.templates import DEEPSEEK_R1, QWEN3
from tests.frontend.http.conftest import http  # noqa: F401 - a fixture

USER = chat_pb2.ChatMessage(role="user", content="Hello")
TOOL = chat_pb2.Tool(name="f", description="does", parameters='{"type": "object", "properties": {"x": {}}}')
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
SERVED = Served("m", 4096, template=QWEN3, special_tokens=(("bos_token", "<s>"), ("eos_token", "</s>")))


@pytest.fixture
async def both(http):  # noqa: F811
    """`await both(says, template)` gives a frontend of both protocols whose worker sends these texts."""

    async def start(says=(), template=QWEN3):
        h = await http(workers=1)
        served = dataclasses.replace(SERVED, template=template)
        h.bench.replicas.update(frozenset({dataclasses.replace(h.bench.workers[0].endpoint, served=served)}))
        h.bench.workers[0].says = list(says)
        return h

    return start


async def chat(h, *messages, **fields):
    stub = chat_pb2_grpc.ChatServiceStub(h.bench.channel)
    request = chat_pb2.ChatRequest(messages=messages or [USER], **fields)
    return [response async for response in stub.Chat(request, timeout=30)]


async def refused(h, *messages, **fields):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat(h, *messages, **fields)
    return caught.value.code(), rich_status.field_violations(rich_status.from_error(caught.value))


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    },
    {"role": "tool", "content": "42", "tool_call_id": "a"},
    {"role": "user", "content": "Again"},
]
SAME = [
    chat_pb2.ChatMessage(role="system", content="Be brief."),
    chat_pb2.ChatMessage(role="user", content="Add"),
    chat_pb2.ChatMessage(
        role="assistant",
        content="",
        reasoning_content="hm",
        tool_calls=[chat_pb2.ToolCall(id="a", name="f", arguments='{"x": 1}')],
    ),
    chat_pb2.ChatMessage(role="tool", content="42", tool_call_id="a"),
    chat_pb2.ChatMessage(role="user", content="Again"),
]
FUNCTION = {"name": "f", "description": "does", "parameters": {"type": "object", "properties": {"x": {}}}}
CHOICES = {
    "auto": ("auto", chat_pb2.ToolChoice(mode="MODE_AUTO")),
    "none": ("none", chat_pb2.ToolChoice(mode="MODE_NONE")),
    "required": ("required", chat_pb2.ToolChoice(mode="MODE_REQUIRED")),
    "named": ({"type": "function", "function": {"name": "f"}}, chat_pb2.ToolChoice(function="f")),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK_R1], ids=["qwen3", "deepseek"])
async def test_both_protocols_ask_the_worker_for_the_same_and_answer_the_same(both, template, choice):
    h = await both(["<think>\nso</think>\n\nYes. ", CALL], template)
    over_http, over_grpc = CHOICES[choice]
    talk = TALK if template is QWEN3 else TALK[:2]
    body = {
        "messages": talk,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": over_http,
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    answer = (await h.client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    responses = await chat(
        h,
        *SAME[: len(talk)],
        tools=[TOOL],
        tool_choice=over_grpc,
        sampling=inference_pb2.SamplingParameters(max_tokens=7, temperature=0.5, seed=3),
        template_arguments={"enable_thinking": chat_pb2.TemplateArgument(flag=True)},
    )
    first, second = h.bench.workers[0].asked
    assert first == second
    message = answer["message"]
    assert "".join(r.content for r in responses) == (message["content"] or "").rstrip() or message["content"]
    assert "".join(r.reasoning_content for r in responses) == message["reasoning_content"]
    calls = [(call.name, call.arguments) for r in responses for call in r.tool_calls]
    expected = message.get("tool_calls", [])
    assert calls == [(call["function"]["name"], call["function"]["arguments"]) for call in expected]
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
    assert responses[-1].usage.prompt_tokens == 3
    assert [token for r in responses for token in r.tokens] == [0, 1]


async def test_defaults_are_those_of_grpc_and_as_many_tokens_as_there_is_room_for(both):
    h = await both(["x"])
    await chat(h)
    asked = h.bench.workers[0].asked[-1]
    assert asked.sampling == inference_pb2.SamplingParameters(max_tokens=4096)
    assert asked.without_special_tokens


async def test_a_format_begins_behind_the_reasoning(both):
    h = await both(["x"])
    await chat(h, output_format=inference_pb2.OutputFormat(regex="a"))
    wanted = h.bench.workers[0].asked[-1].output_format
    assert (wanted.regex, wanted.after) == ("a", "</think>")


async def test_log_probabilities_come_with_the_tokens(both):
    h = await both(template="{{ messages[0].content }}")
    (response,) = await chat(
        h,
        chat_pb2.ChatMessage(role="user", content="scored"),
        sampling=inference_pb2.SamplingParameters(logprobs=1),
    )
    assert [round(token.logprob, 3) for token in response.logprobs] == [-0.5, -1, -2]


WRONG = {
    "no messages": ({"messages": []}, "messages", "is missing or empty"),
    "role": ({"messages": [chat_pb2.ChatMessage(role="king", content="x")]}, "messages[0].role", "king"),
    "schema": (
        {"tools": [chat_pb2.Tool(name="f", parameters="{")]},
        "tools[0].parameters",
        "is not valid JSON",
    ),
    "no object": ({"tools": [chat_pb2.Tool(name="f", parameters="[]")]}, "tools[0].parameters", "object"),
    "unnamed": ({"tools": [chat_pb2.Tool()]}, "tools[0].name", "length"),
    "choice": ({"tool_choice": chat_pb2.ToolChoice(mode=9)}, "tool_choice.mode", "does not exist"),
    "nothing to force": ({"tool_choice": CHOICES["required"][1]}, "tool_choice", "there are no tools"),
    "argument": (
        {"template_arguments": {"messages": chat_pb2.TemplateArgument(text="x")}},
        "template_arguments.messages",
        "is not allowed",
    ),
    "after": ({"output_format": inference_pb2.OutputFormat(regex="a", after="b")}, "output_format", "after"),
    "both": (
        {"tools": [TOOL], "output_format": inference_pb2.OutputFormat(json_object=True)},
        "output_format",
        "excludes tools",
    ),
    "scores": (
        {"sampling": inference_pb2.SamplingParameters(prompt_logprobs=1)},
        "sampling.prompt_logprobs",
        "leave it out",
    ),
}


@pytest.mark.parametrize(("fields", "field", "words"), WRONG.values(), ids=WRONG)
async def test_what_cannot_be_answered_is_refused_by_name(both, fields, field, words):
    h = await both()
    stub = chat_pb2_grpc.ChatServiceStub(h.bench.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Chat(chat_pb2.ChatRequest(**{"messages": [USER], **fields}), timeout=30):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = rich_status.field_violations(rich_status.from_error(caught.value))
    assert violation.field == field
    assert words in violation.description
    assert h.bench.workers[0].requests == 0


async def test_errors_of_the_worker_name_the_field_of_the_conversation(both):
    h = await both(template="{{ messages[0].content }}")
    code, [violation] = await refused(h, chat_pb2.ChatMessage(role="user", content="bad"))
    assert (code, violation.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p")
    code, _ = await refused(h, chat_pb2.ChatMessage(role="user", content="full"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    h = await both(template="")
    code, [violation] = await refused(h)
    assert "has no chat template" in violation.description


async def test_a_conversation_survives_the_loss_of_its_worker(bench):
    b = await bench(workers=0)
    for name in ("p-0", "p-1"):
        await b.add_process(name, "r1", most=20)
    template = "{{ messages[0].content }}"
    ready = frozenset(
        dataclasses.replace(endpoint, served=Served("m", 4096, template=template)) for endpoint in b.extra
    )
    b.replicas.update(ready)
    stub, said = chat_pb2_grpc.ChatServiceStub(b.channel), []
    message = chat_pb2.ChatMessage(role="user", content="count 30 0.02")
    sampling = inference_pb2.SamplingParameters(max_tokens=30)
    async for response in stub.Chat(chat_pb2.ChatRequest(messages=[message], sampling=sampling), timeout=30):
        said += response.content.split()
        if len(said) == 10:
            b.processes[said[0].split(":")[0]].kill()
    assert [int(part.split(":")[1]) for part in said] == list(range(30))
    assert len({part.split(":")[0] for part in said}) == 2
