"""Frames of messages between processes: frozen dataclasses as MessagePack, one in each frame.

A frame consists of 4 bytes of length (big endian), 1 byte for the kind of message, and the message's fields.
The reader checks the type of every field. Messages are plain data, so neither side can make the other run
code.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final, Generic, TypeVar, cast

import msgspec

LENGTH_BYTES: Final = 4
_ENCODER: Final = msgspec.msgpack.Encoder()
M = TypeVar("M")


class MalformedMessageError(Exception):
    """A frame contains no message of the expected kinds."""


class Codec(Generic[M]):
    """Encodes and decodes messages of these types; their order is part of the format."""

    def __init__(self, kinds: Sequence[type[Any]]) -> None:
        self._kinds = kinds
        self._numbers = {kind: bytes([number]) for number, kind in enumerate(kinds)}
        self._decoders = [msgspec.msgpack.Decoder(kind) for kind in kinds]

    @property
    def digest(self) -> str:
        """Another one where kinds of messages or their fields differ."""
        forms = [
            (kind.__name__, [(each.name, str(each.type)) for each in fields(kind)]) for kind in self._kinds
        ]
        return hashlib.sha256(repr(forms).encode()).hexdigest()

    def encode(self, message: M) -> bytes:
        """The frame of one message."""
        payload = self._numbers[type(message)] + _ENCODER.encode(message)
        return len(payload).to_bytes(LENGTH_BYTES, "big") + payload

    def decode(self, payload: bytes) -> M:
        """The message in a frame, without its length. Raises MalformedMessageError."""
        if not payload or payload[0] >= len(self._kinds):
            raise MalformedMessageError(f"a message of {len(payload)} bytes names no known kind")
        kind = payload[0]
        try:
            return cast("M", self._decoders[kind].decode(memoryview(payload)[1:]))
        except msgspec.MsgspecError as error:
            raise MalformedMessageError(f"{self._kinds[kind].__name__}: {error}") from error
