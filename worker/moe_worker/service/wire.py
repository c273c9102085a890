"""Messages between the edge and the engine process: frozen dataclasses as MessagePack, one in each frame.

A frame consists of 4 bytes of length (big endian), 1 byte for the kind of message, and the message's fields.
The reader checks the type of every field. Messages are plain data, so neither side can make the other run
code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast, get_args

import msgspec

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.requests import Delta, Load, Request
from moe_worker.engine.statistics import Event, ExpertStatistics, Statistics

LENGTH_BYTES: Final = 4


@dataclass(frozen=True)
class Start:
    """Edge to engine, first message: load this."""

    model: str
    options: EngineOptions


@dataclass(frozen=True)
class Submit:
    """Edge to engine: compute this request, which has been checked."""

    request: Request


@dataclass(frozen=True)
class Refused:
    """Engine to edge: request `id` was refused for this reason; no other message about it follows.

    retryable: whether the same request can succeed later (the queue is full).
    """

    id: int
    message: str
    retryable: bool


@dataclass(frozen=True)
class Cancel:
    """Edge to engine: cancel this request."""

    id: int


@dataclass(frozen=True)
class AskExperts:
    """Edge to engine: send an ExpertReport after the current step."""


@dataclass(frozen=True)
class ExpertReport:
    """Engine to edge: the tokens of each expert so far."""

    experts: ExpertStatistics


@dataclass(frozen=True)
class Loaded:
    """Engine to edge: ready for at most `most_requests` requests (KV memory may limit the batch)."""

    format: str
    load: Load
    most_requests: int


@dataclass(frozen=True)
class Failed:
    """Engine to edge, last message: why the engine ends, for the user."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Stepped:
    """Engine to edge: results since the last such message.

    `start_ns` and `end_ns` are of `time.monotonic_ns`, which all processes of a machine share; `submitted`
    counts all requests that the engine has received so far, including refused ones.
    """

    start_ns: int
    end_ns: int
    deltas: tuple[Delta, ...]
    load: Load
    submitted: int
    statistics: Statistics
    events: tuple[Event, ...] = ()


Message = Start | Submit | Refused | Cancel | AskExperts | ExpertReport | Loaded | Failed | Stepped


class MalformedMessageError(Exception):
    """A frame contains no message of this module."""


_KINDS: Final[Sequence[type[Message]]] = get_args(Message)
_NUMBERS: Final[Mapping[type, bytes]] = {kind: bytes([number]) for number, kind in enumerate(_KINDS)}
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODERS: Final[Sequence[msgspec.msgpack.Decoder[Any]]] = [msgspec.msgpack.Decoder(kind) for kind in _KINDS]


def encode(message: Message) -> bytes:
    """The frame of one message."""
    payload = _NUMBERS[type(message)] + _ENCODER.encode(message)
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def decode(payload: bytes) -> Message:
    """The message in a frame, without its length. Raises MalformedMessageError."""
    if not payload or payload[0] >= len(_KINDS):
        raise MalformedMessageError(f"a message of {len(payload)} bytes names no known kind")
    kind = payload[0]
    try:
        return cast("Message", _DECODERS[kind].decode(memoryview(payload)[1:]))
    except msgspec.MsgspecError as error:
        raise MalformedMessageError(f"{_KINDS[kind].__name__}: {error}") from error
