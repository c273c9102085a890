"""`response_format` in the gRPC API's terms. Pure."""

from typing import Final

from moe_api.inference.v1 import inference_pb2
from moe_frontend.http.errors import invalid
from moe_frontend.http.schemas import ResponseFormat

RENAMED: Final = {
    "output_format": "response_format",
    "output_format.json_object": "response_format",
    "output_format.json_schema": "response_format.json_schema.schema",
}
"""Fields of the gRPC request to those of the HTTP request."""


def output_format(asked: ResponseFormat | None, after: str = "") -> inference_pb2.OutputFormat | None:
    """The format that the text must have; None: any text.

    after: the format begins after this text.

    Raises:
        ApiError: the schema is missing, or is there without a use.
    """
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return inference_pb2.OutputFormat(json_object=True, after=after)
    if asked.json_schema is None:
        raise invalid("response_format.json_schema", "is missing; give a name and a schema")
    # The body has been read as JSON, so this is UTF-8.
    return inference_pb2.OutputFormat(json_schema=bytes(asked.json_schema.schema).decode(), after=after)
