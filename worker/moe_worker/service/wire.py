"""Messages between the edge and the engine process, in frames of `moe_worker.framing`."""

from dataclasses import dataclass
from typing import Final, get_args

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshReport
from moe_worker.engine.requests import Delta, Load, Request
from moe_worker.engine.statistics import Event, ExpertStatistics, Statistics
from moe_worker.framing import Codec


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
    """Engine to edge: ready for at most `most_requests` requests (KV memory may limit the batch).

    mesh: of the leader of a mesh.
    """

    format: str
    load: Load
    most_requests: int
    mesh: MeshReport | None = None


@dataclass(frozen=True)
class Failed:
    """Engine to edge, last message: why the engine ends, for the user."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Stepped:
    """Engine to edge: results since the last such message.

    `start_ns` and `end_ns` are of `time.monotonic_ns`, which all processes of a machine share; `submitted`
    counts all requests that the engine has received so far, including refused ones. `stored` and `evicted`:
    names of blocks of prompts.
    """

    start_ns: int
    end_ns: int
    deltas: tuple[Delta, ...]
    load: Load
    submitted: int
    statistics: Statistics
    events: tuple[Event, ...] = ()
    stored: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()


@dataclass(frozen=True)
class MeshChanged:
    """Engine to edge: what the leader of a mesh says of it now."""

    mesh: MeshReport


@dataclass(frozen=True)
class Waits:
    """Engine to edge: it makes no step, and does not hang: it waits for a rank of its mesh to come back."""


Message = (
    Start
    | Submit
    | Refused
    | Cancel
    | AskExperts
    | ExpertReport
    | Loaded
    | Failed
    | Stepped
    | MeshChanged
    | Waits
)


_CODEC: Final = Codec[Message](get_args(Message))
encode: Final = _CODEC.encode
decode: Final = _CODEC.decode
