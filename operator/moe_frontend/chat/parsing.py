"""The text of a chat becomes reasoning, content and tool calls, as it comes. Pure.

Formats are told by the checkpoint's chat template, which writes the markers that the model was trained on:

- reasoning stands before ``</think>`` (DeepSeek R1 and V3.1, Qwen3);
- Qwen3 (as Hermes): ``<tool_call>`` JSON of name and arguments ``</tool_call>``;
- DeepSeek V3 and R1: between the markers ``tool▁call▁begin`` and ``tool▁call▁end``, ``function``, the marker
  ``tool▁sep``, the name, and a block of JSON;
- DeepSeek V3.1: the same with the name before ``tool▁sep``, and the arguments without a block.
"""

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

_THINK, _THOUGHT = "<think>", "</think>"
_FENCE: Final = "```"
_PART: Final = 4096
"""Characters of a text that are taken at a time: each step copies what is not parsed yet."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a function. arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Piece:
    """What is new of a message."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        begin, end: around each call.
        wrapping: markers around all of them, which say nothing: none, or one before and one behind.
        parse: a call from the text between `begin` and `end`; None where it is none.
        write: what a call of the function with this name has before its arguments, and behind them, between
            `begin` and `end`.
        between: between two calls.
        thought: between the end of the reasoning and the first call.
    """

    begin: str
    end: str
    wrapping: tuple[str, ...]
    parse: Callable[[str], ToolCall | None]
    write: Callable[[str], tuple[str, str]]
    between: str = "\n"
    thought: str = "\n\n"


def tool_format(template: str) -> ToolFormat | None:
    """The format of the model with this chat template; None where it is not known."""
    if _DEEPSEEK.begin in template:
        return _DEEPSEEK if "```json" in template else _DEEPSEEK_V31
    # Qwen3-Coder writes XML between the same markers.
    return _QWEN if _QWEN.begin in template and "<function=" not in template else None


def thinks(template: str) -> bool:
    """Whether the model with this chat template reasons before it answers."""
    return _THOUGHT in template


def unformatted(reasons: bool, prompt: str) -> str:
    """The text up to which an answer has no format: the end of the reasoning, where there is one.

    reasons: whether the model reasons. prompt: the rendered conversation, which may end the reasoning itself.
    """
    return _THOUGHT if reasons and not prompt.rstrip().endswith(_THOUGHT) else ""


class _In(enum.Enum):
    START = "before the first character, where reasoning may begin"
    REASONING = "in the reasoning"
    CONTENT = "in the content"
    CALL = "in a tool call"


@dataclass
class Parser:
    """Of one text.

    Args:
        thinks: whether the model reasons before it answers.
        tools: how it writes tool calls; None: they are content.
        prompt: the rendered conversation, which may begin the reasoning.
    """

    thinks: bool
    tools: ToolFormat | None
    prompt: str
    _state: _In = field(init=False)
    _rest: str = ""
    _fresh: bool = True  # line breaks at the beginning of a part belong to the markers before it
    called: bool = False

    def __post_init__(self) -> None:
        begun = self.thinks and self.prompt.rstrip().endswith(_THINK)
        self._state = _In.REASONING if begun else _In.START if self.thinks else _In.CONTENT
        self._fresh = self.thinks

    def take(self, text: str, *, last: bool = False) -> Piece:
        """What the next part of the text adds. last: nothing follows, so nothing is held back."""
        reasoning: list[str] = []
        content: list[str] = []
        calls: list[ToolCall] = []
        for start in range(0, max(len(text), 1), _PART):
            self._rest += text[start : start + _PART]
            self._advance(reasoning, content, calls, last=last and start + _PART >= len(text))
        if last:
            self._flush(reasoning, content)
        self.called |= bool(calls)
        return Piece("".join(reasoning), "".join(content), tuple(calls))

    def _advance(
        self, reasoning: list[str], content: list[str], calls: list[ToolCall], *, last: bool
    ) -> None:
        """Takes all that it can of the rest."""
        state = None
        while state is not self._state:
            state, self._state = self._state, self._step(reasoning, content, calls, last=last)

    def _step(self, reasoning: list[str], content: list[str], calls: list[ToolCall], *, last: bool) -> _In:
        """Takes what it can of the rest; the state behind it."""
        match self._state:
            case _In.START:
                return self._start(last=last)
            case _In.REASONING:
                if self._freshened() and self._until(_THOUGHT, reasoning):
                    self._fresh = True
                    return _In.CONTENT
                return _In.REASONING
            case _In.CONTENT:
                return self._content(content) if self._freshened() else _In.CONTENT
            case _In.CALL:
                return self._call(content, calls)

    def _start(self, *, last: bool) -> _In:
        begun = self._rest.lstrip()
        if begun.startswith(_THINK):
            self._rest = begun.removeprefix(_THINK)
            return _In.REASONING
        if _THINK.startswith(begun) and not last:
            return _In.START
        self._fresh = False
        return _In.CONTENT

    def _freshened(self) -> bool:
        """Drops line breaks at the beginning of a part; whether it has begun."""
        if self._fresh:
            self._rest = self._rest.lstrip("\n")
            self._fresh = not self._rest
        return not self._fresh

    def _content(self, content: list[str]) -> _In:
        if self.tools is None:
            content.append(self._rest)
            self._rest = ""
            return _In.CONTENT
        for marker in self.tools.wrapping:
            self._rest = self._rest.replace(marker, "")
        if self._until(self.tools.begin, content, *self.tools.wrapping):
            return _In.CALL
        return _In.CONTENT

    def _call(self, content: list[str], calls: list[ToolCall]) -> _In:
        tools = self.tools
        if tools is None or tools.end not in self._rest:
            return _In.CALL
        inner, _, self._rest = self._rest.partition(tools.end)
        call = tools.parse(inner)
        if call is None:
            content.append(f"{tools.begin}{inner}{tools.end}")
        else:
            calls.append(call)
            self._fresh = True
        return _In.CONTENT

    def _until(self, marker: str, into: list[str], *others: str) -> bool:
        """Moves what stands before the marker, and drops that; holds back what may be one's beginning."""
        before, found, behind = self._rest.partition(marker)
        if found:
            into.append(before)
            self._rest = behind
            return True
        held = max(_overlap(self._rest, one) for one in (marker, *others))
        into.append(self._rest[: len(self._rest) - held])
        self._rest = self._rest[len(self._rest) - held :]
        return False

    def _flush(self, reasoning: list[str], content: list[str]) -> None:
        """At the end: what was held back was no marker, and a call without its end is content."""
        if self._state is _In.REASONING:
            reasoning.append(self._rest)
        elif self._state is _In.CALL and self.tools is not None:
            content.append(self.tools.begin + self._rest)
        else:
            content.append(self._rest)
        self._rest = ""


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of the text that the marker begins with."""
    most = min(len(text), len(marker) - 1)
    return next((size for size in range(most, 0, -1) if marker.startswith(text[-size:])), 0)


def _of_qwen(inner: str) -> ToolCall | None:
    value = _object(inner)
    if value is None or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], text)


def _of_deepseek(inner: str) -> ToolCall | None:
    kind, separator, rest = inner.partition(_marker("sep"))
    if not separator:
        return None
    name, arguments = kind.strip(), rest.strip()
    if name == "function":
        name, _, fenced = rest.partition("\n")
        unfenced = _unfenced(fenced)
        if unfenced is None:
            return None
        name, arguments = name.strip(), unfenced
    return ToolCall(name, arguments) if name and _object(arguments) is not None else None


def _unfenced(text: str) -> str | None:
    """What a block of JSON contains; None where the text is no block. Takes linear time."""
    head, line_break, block = text.strip().partition("\n")
    if head.rstrip() not in (_FENCE, f"{_FENCE}json") or not line_break or not block.endswith(_FENCE):
        return None
    return block.removesuffix(_FENCE).strip()


def _marker(name: str) -> str:
    """A marker of DeepSeek's, with its full-width bars."""
    return f"<\uff5ctool\u2581{name}\uff5c>"


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _as_qwen(name: str) -> tuple[str, str]:
    return f'\n{{"name": {json.dumps(name)}, "arguments": ', "}\n"


def _as_deepseek(name: str) -> tuple[str, str]:
    return f"function{_marker('sep')}{name}\n```json\n", "\n```"


def _as_deepseek_v31(name: str) -> tuple[str, str]:
    return f"{name}{_marker('sep')}", ""


_QWEN: Final = ToolFormat("<tool_call>", "</tool_call>", (), _of_qwen, _as_qwen)
_DEEPSEEK: Final = ToolFormat(
    _marker("call\u2581begin"),
    _marker("call\u2581end"),
    (_marker("calls\u2581begin"), _marker("calls\u2581end")),
    _of_deepseek,
    _as_deepseek,
)
_DEEPSEEK_V31: Final = replace(_DEEPSEEK, write=_as_deepseek_v31, between="", thought="")
