"""The sandbox of chat templates, with the dialect of transformers' apply_chat_template. Pure.

https://huggingface.co/docs/transformers/chat_templating_writing describes what templates may use.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

VARIABLES: Final = frozenset({"enable_thinking", "thinking", "preserve_thinking", "reasoning_effort"})
"""Variables of templates that a request may set."""


class TemplateFailureError(Exception):
    """The template refuses the conversation, or is broken; the text says why."""


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant said, which matters in training alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's name

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PublicNamespace(Namespace):
    """A namespace without private names."""

    def __init__(*arguments: Any, **attributes: Any) -> None:
        self, rest = arguments[0], arguments[1:]
        given = dict(*rest, **attributes)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def compile_template(source: str) -> jinja2.Template:
    """The template in its sandbox.

    Raises:
        TemplateFailureError: it is not valid.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse, strftime_now=_now, dict=_new_dict, namespace=_PublicNamespace
    )
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TemplateFailureError(f"the chat template is not valid: {_brief(error)}") from error


def render(template: jinja2.Template, variables: Mapping[str, Any], most: int) -> str:
    """The prompt.

    Args:
        template: of `compile_template`.
        variables: what the template may name.
        most: characters of the prompt at most.

    Raises:
        TemplateFailureError: the template refuses the variables, fails on them, or writes more than that.
    """
    parts, length = [], 0
    try:
        for part in template.generate(**variables):
            length += len(part)
            if length > most:
                raise TemplateFailureError(f"the conversation is longer than {most} characters; shorten it")
            parts.append(part)
    except TemplateFailureError:
        raise
    except jinja2.TemplateError as error:
        raise TemplateFailureError(f"the chat template refuses the conversation: {_brief(error)}") from error
    except Exception as error:  # templates are programs: any operation of theirs may fail
        problem = f"the chat template fails on the conversation: {_brief(error)}"
        raise TemplateFailureError(f"{problem}; correct the messages") from error
    return "".join(parts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON; unlike jinja2's own filter it does not escape for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # the local time, as in transformers


def _new_dict(*arguments: Any, **items: Any) -> dict[Any, Any]:
    return dict(*arguments, **items)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no private name {name!r}")


def _brief(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:300]
