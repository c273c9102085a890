"""Parses requests; those that are no valid protobuf messages, or have too many fields, get a sentence.

By default gRPC returns INTERNAL, "Exception deserializing request!", and logs a stack trace: the client reads
that the server is broken, although its own request is (for example text that is not UTF-8).
"""

from collections.abc import Callable
from typing import Any, Final

from google.protobuf import message

from moe_api import rich_status, wire_fields

Deserializer = Callable[[bytes], Any]

_NOT_A_MESSAGE: Final = (
    "the request is not a valid protobuf message: send one that the .proto file describes, "
    "with all text fields (prompt, stop, model) in UTF-8"
)
_TOO_MANY_FIELDS: Final = (
    f"the request has more than {wire_fields.MOST_FIELDS:,} fields; send at most as many elements as the "
    ".proto file allows, and token ids packed"
)


class MalformedError(Exception):
    """A request cannot be parsed, or would cost too much to parse.

    Attributes:
        violation: says why; its field is "" for the whole request.
    """

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.violation = rich_status.FieldViolation(field, sentence)


def parse(data: bytes, deserialize: Deserializer) -> Any:
    """The message that `deserialize` (of generated code: the class's own FromString) makes of `data`.

    Raises:
        MalformedError: it is none, or has too many fields.
    """
    kind = getattr(getattr(deserialize, "__self__", None), "DESCRIPTOR", None)
    try:
        crowded = None if kind is None else wire_fields.crowded_field(data, kind)
        if crowded is None:
            return deserialize(data)
    except (message.DecodeError, wire_fields.NotWireFormatError):
        raise MalformedError("", _NOT_A_MESSAGE) from None
    raise MalformedError(crowded, _TOO_MANY_FIELDS)
