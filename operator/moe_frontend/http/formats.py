"""`response_format`, and calls of tools that must be made, in the gRPC API's terms. Pure."""

import json
import re
from collections.abc import Sequence
from typing import Final

from moe_api.inference.v1 import inference_pb2
from moe_frontend.chat.parsing import ToolFormat
from moe_frontend.http.errors import invalid
from moe_frontend.http.schemas import FunctionDefinition, ResponseFormat

RENAMED: Final = {
    "output_format": "response_format",
    "output_format.json_object": "response_format",
    "output_format.json_schema": "response_format.json_schema.schema",
    "output_format.tagged": "tools",
    "output_format.tagged.tags": "tools",
}
"""Fields of the gRPC request to those of the HTTP request."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


def output_format(asked: ResponseFormat | None, after: str = "") -> inference_pb2.OutputFormat | None:
    """The format that the text must have; None: any text.

    after: the format begins after this text.

    Raises:
        ApiError: the schema is missing, or not UTF-8.
    """
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return inference_pb2.OutputFormat(json_object=True, after=after)
    if asked.json_schema is None:
        raise invalid("response_format.json_schema", "is missing; give a name and a schema")
    try:  # the decoder of the body has not looked into strings of the schema
        schema = bytes(asked.json_schema.schema).decode()
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte {error.start} of it is none; send JSON in UTF-8"
        raise invalid("response_format.json_schema.schema", problem) from None
    return inference_pb2.OutputFormat(json_schema=schema, after=after)


def tool_calls(
    functions: Sequence[FunctionDefinition], written: ToolFormat, after: str = "", *, single: bool
) -> inference_pb2.OutputFormat:
    """A text that consists of calls of these functions, with arguments that satisfy their schemas.

    Args:
        functions: one or more; those without parameters take no arguments.
        written: how the model writes calls.
        after: the calls begin after this text.
        single: whether only one call is allowed.

    Raises:
        ApiError: a name has characters that would be read as something else in the text of a call.
    """
    before, behind = written.wrapping or ("", "")
    tagged = inference_pb2.TaggedValues(
        before=(written.thought if after else "") + before,
        between=written.between,
        behind=behind,
        single=single,
        tags=[_tag(function, written) for function in functions],
    )
    return inference_pb2.OutputFormat(tagged=tagged, after=after)


def _tag(function: FunctionDefinition, written: ToolFormat) -> inference_pb2.Tag:
    if not _NAME.fullmatch(function.name):
        problem = f"has a function named {function.name!r}, of which a call cannot be forced"
        raise invalid("tools", f"{problem}; use letters, digits and _.:- in names")
    parameters = _NO_ARGUMENTS if function.parameters is None else {"type": "object", **function.parameters}
    begin, end = written.write(function.name)
    schema = json.dumps(parameters, ensure_ascii=False)  # integers of any size
    return inference_pb2.Tag(begin=written.begin + begin, json_schema=schema, end=end + written.end)
