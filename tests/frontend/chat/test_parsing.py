"""Texts of chats become reasoning, content and calls, however they are cut into messages."""

import json
import time

from hypothesis import given
from hypothesis import strategies as st

from moe_frontend.chat.parsing import Parser, ToolCall, thinks, tool_format

QWEN = "{{ '<tool_call>' }}{{ '</think>' }}"
SEP, BEGIN, END = (
    "<\uff5ctool\u2581sep\uff5c>",
    "<\uff5ctool\u2581call\u2581begin\uff5c>",
    "<\uff5ctool\u2581call\u2581end\uff5c>",
)
ALL, DONE = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
DEEPSEEK = "{{ '" + ALL + BEGIN + "' }}{{ '</think>' }}"


def parse(parts, template, prompt="", tools=True):
    """(reasoning, content, calls) of a text that comes in parts."""
    parser = Parser(thinks(template), tool_format(template) if tools else None, prompt)
    pieces = [parser.take(part) for part in parts] + [parser.take("", last=True)]
    return (
        "".join(piece.reasoning for piece in pieces),
        "".join(piece.content for piece in pieces),
        [call for piece in pieces for call in piece.calls],
    )


def deepseek_call(name, arguments):
    return f"{BEGIN}function{SEP}{name}\n```json\n{arguments}\n```{END}"


CASES = [
    (QWEN, "", "<think>\nso\n</think>\n\nyes", ("so\n", "yes", [])),
    (QWEN, "<think>\n", "so</think>\n\nyes", ("so", "yes", [])),
    (QWEN, "<think>\n\n</think>\n\n", "yes <b>", ("", "yes <b>", [])),
    (QWEN, "", "a < b and <tool_cal is no call", ("", "a < b and <tool_cal is no call", [])),
    (QWEN, "", "<think>never done", ("never done", "", [])),
    (
        QWEN,
        "",
        'well\n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        ("", "well\n", [ToolCall("f", '{"x": "é"}'), ToolCall("g", "{}")]),
    ),
    (QWEN, "", "<tool_call>not json</tool_call>", ("", "<tool_call>not json</tool_call>", [])),
    (QWEN, "", '<tool_call>{"name": "f"', ("", '<tool_call>{"name": "f"', [])),
    (QWEN, "", '<tool_call>{"name": 7}</tool_call>', ("", '<tool_call>{"name": 7}</tool_call>', [])),
    (
        QWEN,
        "",
        "<tool_call>" + "[" * 9999 + "</tool_call>",
        ("", "<tool_call>" + "[" * 9999 + "</tool_call>", []),
    ),
    (
        DEEPSEEK,
        "<think>\n",
        "hm</think>\n\n" + ALL + deepseek_call("f", '{"x": 1}') + "\n" + deepseek_call("g", "{}") + DONE,
        ("hm", "", [ToolCall("f", '{"x": 1}'), ToolCall("g", "{}")]),
    ),
    (
        DEEPSEEK,
        "</think>",
        f'one{ALL}{BEGIN}f{SEP}{{"x": 1}}{END}{DONE}two',
        ("", "onetwo", [ToolCall("f", '{"x": 1}')]),
    ),
    (DEEPSEEK, "", f"{BEGIN}f{END}", ("", f"{BEGIN}f{END}", [])),
]


def test_texts_are_taken_apart():
    for template, prompt, text, expected in CASES:
        assert parse([text], template, prompt) == expected, text[:80]


@given(st.sampled_from(CASES), st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_how_a_text_is_cut_changes_nothing(case, sizes):
    template, prompt, text, expected = case
    parts, at = [], 0
    while at < len(text):
        size = sizes[len(parts) % len(sizes)]
        parts.append(text[at : at + size])
        at += size
    assert parse(parts, template, prompt) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "a", "{", "<"])))
def test_nothing_is_lost_but_markers_and_line_breaks(parts):
    reasoning, content, calls = parse(parts, QWEN)
    assert not calls
    kept = (reasoning + content).replace("\n", "")
    text = "".join(parts).replace("\n", "")
    for marker in ("<think>", "</think>"):
        kept, text = kept.replace(marker, ""), text.replace(marker, "")
    assert sorted(kept) == sorted(text)


def test_what_streams_is_sent_as_soon_as_it_is_no_marker():
    parser = Parser(False, tool_format(QWEN), "")
    assert [parser.take(part).content for part in ("a", "<tool", "_x", "<")] == ["a", "", "<tool_x", ""]


def test_without_tools_calls_are_text():
    assert parse(["<tool_call>{}</tool_call>"], QWEN, tools=False) == ("", "<tool_call>{}</tool_call>", [])


def test_a_format_is_told_by_the_template():
    assert tool_format("plain") is None
    assert tool_format("<tool_call><function=name>") is None  # Qwen3-Coder's XML
    assert not thinks("plain")
    assert (
        json.loads(parse(['<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'], QWEN)[2][0].arguments)
        == {}
    )


def test_hostile_texts_take_linear_time():
    """The event loop parses. Models may repeat line breaks or markers until the end of the context."""
    breaks = "\n" * 1200
    fenced = f"{BEGIN}function{SEP}f\n```json{breaks}{{}}{breaks}x{END}"
    calls = "<tool_call></tool_call>" * 30_000
    began = time.process_time()
    assert parse([ALL + fenced], DEEPSEEK, "</think>")[1:] == (fenced, [])
    assert parse([calls], QWEN, "<think>\n\n</think>")[1:] == (calls, [])
    assert time.process_time() - began < 1.0
