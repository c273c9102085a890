"""Conversations of the gRPC API in terms of the HTTP API, whose checks they pass. Pure."""

from typing import Any, Final

import msgspec

from moe_api.inference.v1 import chat_pb2
from moe_frontend.http.bodies import of_validation
from moe_frontend.http.errors import invalid
from moe_frontend.http.schemas import ChatRequest

_TEXTS: Final = frozenset({"content", "name", "tool_call_id", "reasoning_content"})
_MODES: Final = {
    chat_pb2.ToolChoice.MODE_UNSPECIFIED: None,
    chat_pb2.ToolChoice.MODE_AUTO: "auto",
    chat_pb2.ToolChoice.MODE_NONE: "none",
    chat_pb2.ToolChoice.MODE_REQUIRED: "required",
}


def chat_request(request: chat_pb2.ChatRequest) -> ChatRequest:
    """The request as HTTP has it, but for sampling and output format, which stay as they are.

    Raises:
        ApiError: it is not valid, as far as that can be told here.
    """
    if request.sampling.HasField("prompt_logprobs"):
        raise invalid("sampling.prompt_logprobs", "is not supported in conversations; leave it out")
    if request.output_format.WhichOneof("kind") == "tagged" or request.output_format.after:
        raise invalid("output_format", "has `tagged` or `after`, which conversations exclude; leave them out")
    fields: dict[str, Any] = {
        "messages": [_message(message) for message in request.messages],
        "chat_template_kwargs": {
            name: argument.flag if argument.WhichOneof("kind") == "flag" else argument.text
            for name, argument in request.template_arguments.items()
        },
    }
    if request.tools:
        fields["tools"] = [_tool(number, tool) for number, tool in enumerate(request.tools)]
    if request.HasField("output_format"):  # excludes tools, whatever it is
        fields["response_format"] = {"type": "json_object"}
    try:
        return msgspec.convert(fields | _choice(request.tool_choice), ChatRequest)
    except msgspec.ValidationError as error:
        raise of_validation(str(error), ChatRequest) from None


def _message(message: chat_pb2.ChatMessage) -> dict[str, Any]:
    fields = {field.name: value for field, value in message.ListFields() if field.name in _TEXTS}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return {"role": message.role, **fields}


def _tool(number: int, tool: chat_pb2.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.HasField("description"):
        function["description"] = tool.description
    if tool.HasField("parameters"):
        function["parameters"] = _schema(number, tool.parameters)
    return {"type": "function", "function": function}


def _schema(number: int, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(
            f"tools[{number}].parameters", f"is not valid JSON: {problem}; send a JSON Schema"
        ) from None


def _choice(choice: chat_pb2.ToolChoice) -> dict[str, Any]:
    fields: dict[str, Any] = {"parallel_tool_calls": False} if choice.single else {}
    if choice.WhichOneof("kind") == "function":
        return {**fields, "tool_choice": {"type": "function", "function": {"name": choice.function}}}
    if choice.mode not in _MODES:
        raise invalid("tool_choice.mode", f"is {choice.mode}, which does not exist; use a value of the enum")
    mode = _MODES[choice.mode]
    return fields if mode is None else {**fields, "tool_choice": mode}
