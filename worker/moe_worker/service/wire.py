"""What the edge and the engine process say to one another: frozen dataclasses as JSON, one a frame.

A frame is 4 bytes of length (big endian) and a JSON object whose "type" names the class. Plain data, so that
neither side can make the other run code.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.requests import Delta, FinishReason, Load, Request
from moe_worker.engine.statistics import Event, EventKind, ExpertStatistics, LayerExperts, Statistics
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.parameters import SamplingParameters

LENGTH_BYTES = 4


@dataclass(frozen=True)
class Start:
    """Edge to engine, first: load this."""

    model: str
    options: EngineOptions


@dataclass(frozen=True)
class Submit:
    """Edge to engine: compute this request, which has been checked."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """Edge to engine: nobody waits for this request any more."""

    id: int


@dataclass(frozen=True)
class AskExperts:
    """Edge to engine: answer with ExpertReport, after the step under way."""


@dataclass(frozen=True)
class ExpertReport:
    """Engine to edge: where the tokens went so far."""

    experts: ExpertStatistics


@dataclass(frozen=True)
class Loaded:
    """Engine to edge: requests can come, `most_requests` at once (KV memory may cut the batch)."""

    format: str
    load: Load
    most_requests: int


@dataclass(frozen=True)
class Failed:
    """Engine to edge, last: why the engine ends, for the user."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Stepped:
    """Engine to edge: what happened since the last one.

    `start_ns` and `end_ns` are wall-clock times of the step; `submitted` counts all requests taken so far.
    """

    start_ns: int
    end_ns: int
    deltas: tuple[Delta, ...]
    load: Load
    submitted: int
    statistics: Statistics
    events: tuple[Event, ...] = ()


Message = Start | Submit | Cancel | AskExperts | ExpertReport | Loaded | Failed | Stepped


def encode(message: Message) -> bytes:
    """The frame of one message."""
    body = {"type": type(message).__name__} | vars(message)
    payload = json.dumps(body, default=_plain, separators=(",", ":")).encode()
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def decode(payload: bytes) -> Message:
    """The message in a frame, without its length."""
    body = json.loads(payload)
    return _READERS[body.pop("type")](body)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return vars(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _request(body: Mapping[str, Any]) -> Request:
    given = body["sampling"]
    tuples = {
        "stop": tuple(given["stop"]),
        "stop_token_ids": tuple(given["stop_token_ids"]),
        "logit_bias": tuple((token, bias) for token, bias in given["logit_bias"]),
    }
    sampling = SamplingParameters(**given | tuples)
    tokens = {name: tuple(body[name]) for name in ("prompt", "written")}
    return Request(**dict(body) | tokens | {"sampling": sampling})


def _delta(body: Sequence[Any]) -> Delta:
    id_, text, token, reason, logprobs = body
    return Delta(
        id_,
        text,
        token,
        None if reason is None else FinishReason(reason),
        None if logprobs is None else _logprobs(logprobs),
    )


def _logprobs(body: Mapping[str, Any]) -> TokenLogprobs:
    return TokenLogprobs(body["logprob"], tuple((token, value) for token, value in body["top"]))


def _stepped(body: Mapping[str, Any]) -> Stepped:
    deltas = tuple(_delta(delta) for delta in body["deltas"])
    return Stepped(
        body["start_ns"],
        body["end_ns"],
        deltas,
        Load(**body["load"]),
        body["submitted"],
        Statistics(*body["statistics"]),
        tuple(Event(id_, EventKind(kind), tokens) for id_, kind, tokens in body["events"]),
    )


def _experts(body: Mapping[str, Any]) -> ExpertReport:
    layers = (LayerExperts(number, tuple(tokens), active) for number, tokens, active in body["layers"])
    return ExpertReport(ExpertStatistics(body["steps"], tuple(layers)))


_READERS: Mapping[str, Callable[[dict[str, Any]], Message]] = {
    "Start": lambda body: Start(body["model"], EngineOptions(**body["options"])),
    "Submit": lambda body: Submit(_request(body["request"])),
    "Cancel": lambda body: Cancel(body["id"]),
    "AskExperts": lambda _: AskExperts(),
    "ExpertReport": lambda body: _experts(body["experts"]),
    "Loaded": lambda body: Loaded(body["format"], Load(**body["load"]), body["most_requests"]),
    "Failed": lambda body: Failed(**body),
    "Stepped": _stepped,
}
