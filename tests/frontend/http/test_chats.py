"""/v1/chat/completions as OpenAI's client and raw HTTP see it."""

import dataclasses
import json

import openai
import pydantic
import pytest

from moe_frontend.discovery.endpoints import Served
from tests.frontend.chat.templates import DEEPSEEK_R1, QWEN3
from tests.frontend.http.test_completions import events

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
USER = {"role": "user", "content": "Hello"}


async def chatting(http, template=QWEN3, says=(), **options):
    """A frontend whose model has this template; its worker sends these texts."""
    h = await http(workers=1, **options)
    served = Served(
        "m", 4096, template=template, special_tokens=(("bos_token", "<s>"), ("eos_token", "</s>"))
    )
    h.bench.replicas.update(frozenset({dataclasses.replace(h.bench.workers[0].endpoint, served=served)}))
    h.bench.workers[0].says = list(says)
    return h


async def chat(h, *messages, **fields):
    return await h.client.post("/v1/chat/completions", json={"messages": messages or [USER], **fields})


async def test_openais_client_gets_an_answer_to_the_rendered_conversation(http):
    h = await chatting(http, says=["<think>\nhm", "\n</think>\n\n", "Hi", "!"])
    answer = await h.openai.chat.completions.create(
        model="m", messages=[{"role": "system", "content": "Be brief."}, USER], max_completion_tokens=9
    )
    request = h.bench.workers[0].asked[-1]
    assert request.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert request.without_special_tokens
    assert request.sampling.max_tokens == 9
    (choice,) = answer.choices
    assert (answer.object, answer.model, choice.finish_reason) == ("chat.completion", "m", "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "Hi!")
    assert choice.message.reasoning_content == "hm\n"
    assert choice.message.tool_calls is None
    assert answer.usage.total_tokens == 7


async def test_a_stream_has_a_role_then_reasoning_then_content(http):
    h = await chatting(http, DEEPSEEK_R1, says=["a", "b</thi", "nk>\n", "\nHi", "!"])
    response = await chat(h, stream=True, stream_options={"include_usage": True})
    assert h.bench.workers[0].asked[-1].prompt.startswith("<s>")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas == [
        {"role": "assistant", "reasoning_content": "a"},
        {"reasoning_content": "b"},
        {"content": "Hi"},
        {"content": "!"},
        {},
    ]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 5)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


async def test_openais_client_gets_the_calls_of_tools(http):
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    h = await chatting(http, says=["<think>\n\n</think>\n\n", call[:20], call[20:], "\n" + call])
    asked = {"model": "m", "messages": [USER], "tools": TOOLS, "tool_choice": "auto"}
    answer = await h.openai.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert [call.function.name for call in choice.message.tool_calls] == ["f", "f"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"x": 1}
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert '{"type": "function", "function": {"name": "f"' in h.bench.workers[0].asked[-1].prompt
    async with h.openai.chat.completions.stream(**asked) as stream:
        await stream.until_done()
        final = await stream.get_final_completion()
    assert [call.function.arguments for call in final.choices[0].message.tool_calls] == ['{"x": 1}'] * 2
    assert final.choices[0].finish_reason == "tool_calls"
    # What came of it is asked in turn.
    messages = [USER, final.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"})]
    for made in messages[1]["tool_calls"]:
        made["function"].pop("parsed_arguments", None)
    messages.append({"role": "tool", "content": "42", "tool_call_id": messages[1]["tool_calls"][0]["id"]})
    await h.openai.chat.completions.create(**asked | {"messages": messages})
    assert "<tool_response>\n42\n</tool_response>" in h.bench.workers[0].asked[-1].prompt


async def test_fields_that_clients_send_without_a_value_change_nothing(http):
    h = await chatting(http, says=["x"])
    function = {"name": "f", "description": None, "parameters": None, "strict": None}
    assert (await chat(h, tools=[{"type": "function", "function": function}], top_k=-1)).status_code == 200
    asked = h.bench.workers[0].asked[-1]
    assert '{"type": "function", "function": {"name": "f"}}' in asked.prompt
    assert asked.sampling.top_k == 0
    assert (await chat(h, top_k=-2)).status_code == 400


class Person(pydantic.BaseModel):
    name: str
    age: int


async def test_openais_client_gets_the_format_that_it_asks_for(http):
    h = await chatting(http, says=["<think>who</think>", '{"name": "Ada", "age": 36}'])
    answer = await h.openai.chat.completions.parse(model="m", messages=[USER], response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)
    wanted = h.bench.workers[0].asked[-1].output_format
    assert json.loads(wanted.json_schema)["required"] == ["name", "age"]
    assert wanted.after == "</think>"
    fields = {"chat_template_kwargs": {"enable_thinking": False}, "response_format": {"type": "json_object"}}
    await chat(h, **fields)
    wanted = h.bench.workers[0].asked[-1].output_format
    assert (wanted.json_object, wanted.after) == (True, "")
    await h.complete("x", model="m", response_format={"type": "json_object"})
    assert h.bench.workers[0].asked[-1].output_format.json_object


async def test_without_tools_the_marks_of_calls_are_content(http):
    h = await chatting(http, says=["<tool_call>{}</tool_call>"])
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        found = (await chat(h, **fields)).json()["choices"][0]
        assert (found["message"]["content"], found["finish_reason"]) == ("<tool_call>{}</tool_call>", "stop")


async def test_a_template_is_told_what_the_request_allows(http):
    h = await chatting(http, says=["x"])
    await chat(h, chat_template_kwargs={"enable_thinking": False})
    assert h.bench.workers[0].asked[-1].prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    await chat(h, {"role": "developer", "content": "c"}, parts)
    assert (
        h.bench.workers[0]
        .asked[-1]
        .prompt.startswith("<|im_start|>system\nc<|im_end|>\n<|im_start|>user\na\nb<")
    )
    assert h.bench.workers[0].asked[-1].sampling.max_tokens == 4096


async def test_log_probabilities_and_several_texts(http):
    h = await chatting(http, "{{ messages[0].content }}")
    found = (await chat(h, {"role": "user", "content": "scored"}, logprobs=True, top_logprobs=1, n=2)).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    content = found["choices"][1]["logprobs"]["content"]
    assert [token["bytes"] for token in content] == [[110], [195], [169]]
    assert content[0]["top_logprobs"] == [{"token": "m", "logprob": -0.25, "bytes": [109]}]
    assert found["usage"]["prompt_tokens"] == 9
    assert h.bench.workers[0].asked[-1].sampling.logprobs == 1


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"messages": []}, "messages", "is missing or empty"),
        (
            {"messages": [{"role": "king"}]},
            "messages[0].role",
            "use assistant, developer, system, tool, user",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "invalid enum value 'image_url'; use text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
            "messages[0].content[0]",
            "missing required field type",
        ),
        ({"messages": [USER | {"x": 1}]}, "messages[0].x", "is not a field"),
        (
            {"response_format": {"type": "grammar"}},
            "response_format.type",
            "'grammar'; use json_object, json_schema, text",
        ),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "'any'; use auto, none, required"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema",
            "missing required field name",
        ),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS}, "response_format", "excludes tools"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"functions": [{}]}, "functions", "is not supported"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages", "is not allowed"),
        ({"chat_template_kwargs": {"thinking": "x" * 65}}, "chat_template_kwargs.thinking", "is longer"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "is not a field"),
        ({"parallel_tool_calls": False, "tools": TOOLS}, "parallel_tool_calls", "can be false only"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "expected int >= 1"),
    ],
)
async def test_what_cannot_be_answered_is_refused_by_name(http, fields, param, sentence):
    h = await chatting(http)
    response = await h.client.post("/v1/chat/completions", json={"messages": [USER]} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert sentence in error["message"]
    assert h.bench.workers[0].requests == 0


async def test_a_model_without_a_template_and_one_that_refuses_say_so(http):
    h = await chatting(http, "")
    assert "has no chat template" in (await chat(h)).json()["error"]["message"]
    h = await chatting(http, "{{ raise_exception('no') }}")
    error = (await chat(h)).json()["error"]
    assert (error["param"], error["message"]) == (
        "messages",
        "the chat template refuses the conversation: no",
    )
    h = await chatting(http, "plain")
    assert (
        "how this model writes calls is not known" in (await chat(h, tools=TOOLS)).json()["error"]["message"]
    )


async def test_schemas_of_tools_may_hold_integers_of_any_size(http):
    h = await chatting(http, "<tool_call>{{ tools | tojson }}", says=["a"])
    for number in (2**64, -(2**63) - 1, 10**40):
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"minimum": number}}}]
        assert (await chat(h, tools=tools)).status_code == 200
        assert f'"minimum": {number}}}' in h.bench.workers[0].asked[-1].prompt


async def test_deep_tools_and_errors_of_the_worker_name_the_field_of_the_request(http):
    h = await chatting(http, "{{ messages[0].content }}")
    deep = {}
    for _ in range(100):
        deep = {"a": deep}
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    assert "nested more than 64 deep" in (await chat(h, tools=tools)).json()["error"]["message"]
    with pytest.raises(openai.BadRequestError) as caught:
        await h.openai.chat.completions.create(model="m", messages=[{"role": "user", "content": "bad"}])
    assert caught.value.param == "top_p"
