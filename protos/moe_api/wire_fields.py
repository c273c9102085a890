"""Counts the fields of a protobuf message before it is parsed, up to a bound.

Parsing can cost much more than the size suggests: 16 MiB of empty texts take 1.8 s and 250 MB. No valid
request has many fields, so counting stops after a few thousand. The wire format:
https://protobuf.dev/programming-guides/encoding/
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from google.protobuf.descriptor import Descriptor

MOST_FIELDS: Final = 4096
"""Fields of a request, including nested messages; a valid one has at most 1,200 (a full logit_bias)."""

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_FIXED_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}
_VARINT_BYTES: Final = 10


class NotWireFormatError(ValueError):
    """The bytes are not a message, or contain groups, which no message here has."""


def crowded_field(data: bytes, descriptor: Descriptor, most: int = MOST_FIELDS) -> str | None:
    """The field with most elements ("sampling.stop") of a message with more than `most` fields, or None.

    Every element of a repeated field is a separate field, except for packed numbers, which are the default. A
    field that the type does not have counts for the message that contains it ("" for the request itself).

    Raises:
        NotWireFormatError: the bytes became invalid before the bound was reached.
    """
    seen: Counter[str] = Counter()
    left, waiting = most, [(0, len(data), descriptor, "")]
    while waiting:
        start, end, kind, path = waiting.pop()
        for number, begin, stop in _fields(data, start, end):
            field = kind.fields_by_number.get(number)
            name = path if field is None else f"{path}.{field.name}".lstrip(".")
            seen[name] += 1
            left -= 1
            if left < 0:
                return seen.most_common(1)[0][0]
            if begin is not None and field is not None and field.message_type is not None:
                waiting.append((begin, stop, field.message_type, name))
    return None


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int | None, int]]:
    """(number, where its bytes begin or None for a number, where they end) of each field."""
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        begin = None
        if wire == _VARINT:
            _, at = _varint(data, at, end)
        elif wire == _BYTES:
            length, begin = _varint(data, at, end)
            at = begin + length
        elif wire in _FIXED_SIZES:
            at += _FIXED_SIZES[wire]
        else:
            raise NotWireFormatError(f"wire type {wire}")
        if at > end:
            raise NotWireFormatError("a field is longer than its message")
        yield tag >> 3, begin, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(min(_VARINT_BYTES, end - at)):
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise NotWireFormatError("a number does not end")
