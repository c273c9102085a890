"""The OpenAPI description of what this port serves, made of the types that requests and answers have. Pure.

https://spec.openapis.org/oas/v3.1.1. Fields that are accepted without effect, or refused unless they are
null, are described as `schemas` declares them: OpenAI's clients may send them.
"""

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from moe_frontend.http import answers
from moe_frontend.http.schemas import ChatRequest, CompletionRequest

_COMPONENT: Final = "#/components/schemas/{name}"
_TYPES: Final = (
    CompletionRequest,
    ChatRequest,
    answers.Completion,
    answers.Chat,
    answers.ModelList,
    answers.Model,
)
_ERROR: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}
_ANY_REQUEST: Final = {
    429: "too many requests",
    431: "the head is too large",
    500: "a bug",
    503: "no replica is ready",
}
_REQUEST_FOR_TEXT: Final = {
    400: "a field is wrong; `param` names it",
    404: "another model is served",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not JSON",
    504: "the deadline of the request passed",
}
# What every request must have, beyond what msgspec declares: there the default says how it is refused.
_REQUIRED: Final = {"CompletionRequest": "prompt", "ChatRequest": "messages"}


@functools.cache
def document() -> bytes:
    """The description, as JSON."""
    _, components = msgspec.json.schema_components(_TYPES, ref_template=_COMPONENT)
    for name, field in _REQUIRED.items():
        components[name]["required"] = [field]
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "moe-operator: the part of OpenAI's API that a frontend serves",
                "version": importlib.metadata.version("moe-operator"),
            },
            "paths": _paths(),
            "components": {"schemas": {**components, "Error": _ERROR}},
        }
    )


def _paths() -> dict[str, Any]:
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/completions": {"post": _for_text("continues prompts", "CompletionRequest", "Completion")},
        "/v1/chat/completions": {"post": _for_text("continues conversations", "ChatRequest", "Chat")},
        "/v1/models": {"get": _operation("the model that is served", _json("ModelList"), {})},
        "/v1/models/{model}": {
            "get": {
                **_operation("the model of this name", _json("Model"), {404: "another model is served"}),
                "parameters": [name],
            }
        },
        "/version": {
            "get": {
                "summary": "the version of moe-operator",
                "responses": {
                    "200": {
                        "description": "the version",
                        "content": {
                            "application/json": {
                                "schema": {
                                    "type": "object",
                                    "properties": {"version": {"type": "string"}},
                                    "required": ["version"],
                                }
                            }
                        },
                    }
                },
            }
        },
        "/health": {
            "get": {
                "summary": "whether requests are accepted",
                "responses": {"200": {"description": "they are"}, "503": {"description": "they are not"}},
            }
        },
    }


def _for_text(summary: str, request: str, answer: str) -> dict[str, Any]:
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        **_operation(summary, {**_json(answer), **stream}, _REQUEST_FOR_TEXT),
        "requestBody": {"required": True, "content": _json(request)},
    }


def _operation(summary: str, content: dict[str, Any], errors: Mapping[int, str]) -> dict[str, Any]:
    refusals = {
        str(status): {"description": meaning, "content": _json("Error")}
        for status, meaning in sorted({**errors, **_ANY_REQUEST}.items())
    }
    return {
        "summary": summary,
        "responses": {"200": {"description": "the answer", "content": content}, **refusals},
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _COMPONENT.format(name=name)}}}
