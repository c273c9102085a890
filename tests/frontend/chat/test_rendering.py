"""Conversations become the prompts that transformers makes of them; templates that misbehave are stopped."""

import asyncio
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moe_frontend.chat.environment import TemplateFailureError, compile_template, render
from moe_frontend.chat.renderer import Renderer, RendererNotStartedError, RenderError
from tests.frontend.chat.templates import TEMPLATES

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the <weather> & more.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Köln", "Oslo"]}},
            },
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "Grüße, 'you' & \"me\" 🦉"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo", "reasoning_content": "hm"},
        {"role": "user", "content": "Three"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "tool", "content": "sun", "tool_call_id": "c2"},
        {"role": "user", "content": "Thanks"},
    ],
]
SPECIAL = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["one", "system", "turns", "tools"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "with-tools"])
@pytest.mark.parametrize("flags", [{}, {"enable_thinking": False}, {"thinking": True}], ids=str)
def test_prompts_are_those_of_transformers(name, conversation, tools, flags):
    template = TEMPLATES[name]
    expected = render_jinja_template(
        [conversation], tools=tools, chat_template=template, add_generation_prompt=True, **SPECIAL, **flags
    )
    expected = expected[0] if isinstance(expected, tuple) else expected
    variables = {"messages": conversation, "tools": tools, "documents": None, "add_generation_prompt": True}
    ours = render(compile_template(template), {**variables, **SPECIAL, **flags}, 10_000)
    assert [ours] == (expected if isinstance(expected, list) else [expected])


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% if %}", "the chat template is not valid"),
        ("{{ raise_exception('only users may speak') }}", "refuses the conversation: only users may speak"),
        ("{{ messages[0].content.missing.more }}", "the chat template refuses the conversation"),
        ("{{ 1 / 0 }}", "fails on the conversation: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{{ namespace(_x=1) }}", "a namespace has no private name"),
        ("{{ cycler.__init__.__globals__ }}", "refuses the conversation"),
        ("{% for i in range(9) %}{{ 'x' * 1000 }}{% endfor %}", "is longer than 5000 characters"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails on the conversation: Range too big"),
        ("{% include 'passwd' %}", "the chat template"),
    ],
)
def test_a_template_that_cannot_be_rendered_says_why(template, sentence):
    with pytest.raises(TemplateFailureError, match=sentence):
        render(compile_template(template), {"messages": [{"content": "x"}]}, 5000)


async def rendered(renderer, template, most=10_000, **variables):
    return await renderer.render(template, variables, most)


@pytest.fixture
async def renderer():
    running = Renderer(limit_s=20)
    yield running
    await running.close()


async def test_a_process_renders_many(renderer):
    assert await rendered(renderer, "{{ a }}é", a="1") == "1é"
    began = time.monotonic()
    found = await asyncio.gather(*(rendered(renderer, "{{ a }}", a=str(n)) for n in range(50)))
    assert found == [str(n) for n in range(50)]
    assert time.monotonic() - began < 15


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


async def test_a_template_without_end_is_stopped_and_the_next_one_rendered():
    running = Renderer(limit_s=1)
    with pytest.raises(RenderError, match="did not render the conversation within 1 s"):
        await rendered(running, LOOP)
    assert await rendered(running, "still {{ 1 }}") == "still 1"
    await running.close()


@pytest.mark.parametrize(
    "template", ["{{ 'x' * 10**10 }}", "{{ '%1000000000d' % 1 }}", "{{ 'x'.center(10**10) }}"]
)
async def test_a_template_that_fills_the_memory_is_stopped(renderer, template):
    with pytest.raises(RenderError, match=r"memory|longer|ended|fails"):
        await rendered(renderer, template)
    assert await rendered(renderer, "{{ 2 }}") == "2"


async def test_a_caller_that_leaves_takes_its_process_along():
    running = Renderer(limit_s=60)
    assert await rendered(running, "{{ 1 }}") == "1"
    (child,) = running._pool._idle
    leaving = asyncio.create_task(rendered(running, LOOP))
    async with asyncio.timeout(60):
        while running._pool._idle:
            await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert child.process.returncode is not None
    assert await rendered(running, "{{ 3 }}") == "3"
    await running.close()


async def test_an_idle_process_that_was_killed_costs_no_conversation(renderer):
    assert await rendered(renderer, "{{ 1 }}") == "1"
    for child in renderer._pool._idle:
        child.process.kill()
        await child.process.wait()
    assert await rendered(renderer, "{{ 2 }}") == "2"


async def test_a_process_that_does_not_start_is_said(monkeypatch):
    monkeypatch.setattr("moe_frontend.chat.renderer._MODULE", "moe_frontend.chat.missing")
    with pytest.raises(RendererNotStartedError, match="does not start; try later"):
        await rendered(Renderer(), "{{ 1 }}")
