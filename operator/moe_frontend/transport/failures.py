"""How an attempt at a replica can fail, and the status that the client gets."""

import asyncio
import dataclasses
import enum
from collections.abc import Sequence
from typing import Final

import grpc
from google.rpc import status_pb2

from moe_api import rich_status
from moe_api.rich_status import FieldViolation
from moe_api.supervision import is_being_cancelled
from moe_frontend.policy import routing
from moe_frontend.transport import metadata
from moe_frontend.transport.holding import see_why
from moe_frontend.transport.metadata import Pairs

# The text of gRPC's own RESOURCE_EXHAUSTED for a message that a server does not accept.
_TOO_LARGE: Final = "message larger than max"
_TOO_LARGE_SENTENCE: Final = "the request is too large for the model: no prompt of that size fits; shorten it"
GRPC_INTERNAL: Final = grpc.StatusCode.INTERNAL


class Kind(enum.Enum):
    """What happened to the replica."""

    ANSWERED = "answered with an error"
    UNREACHED = "was not reached, so it never saw the request"
    STOPPED = "was told to stop, and ended what still ran"
    DIED = "died with the request in flight"
    BROKE_PROTOCOL = "broke the protocol"


@dataclasses.dataclass(frozen=True)
class Failure:
    """The end of a failed attempt.

    Attributes:
        kind: what happened to the replica.
        status: for the client, if no other replica succeeds.
        metadata: trailing metadata to forward.
    """

    kind: Kind
    status: status_pb2.Status
    metadata: Pairs = ()

    @property
    def code(self) -> grpc.StatusCode:
        """Of the status."""
        return rich_status.status_code(self.status)


def of_call(
    error: grpc.aio.AioRpcError | asyncio.CancelledError, replica: str, keys: frozenset[str], *, started: bool
) -> Failure:
    """The failure that gRPC reports for a call on an established connection.

    Args:
        error: as caught.
        replica: its name.
        keys: trailing metadata to forward.
        started: whether the client has a part of the response.

    Raises:
        asyncio.CancelledError: the client of this frontend cancelled the call.
    """
    if isinstance(error, asyncio.CancelledError):
        # grpc.aio raises this also if the *replica* ends the call with CANCELLED, as it does with running
        # calls at the end of its grace period.
        if is_being_cancelled():
            raise error
        return Failure(Kind.STOPPED, _lost(replica, "it was stopped", started=started))
    status = rich_status.from_error(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE and not status.details:
        return Failure(Kind.DIED, _lost(replica, error.details() or "connection lost", started=started))
    if _TOO_LARGE in status.message:
        return Failure(Kind.ANSWERED, rich_status.invalid_argument([FieldViolation("", _TOO_LARGE_SENTENCE)]))
    died = rich_status.reason(status) == rich_status.ENGINE_DIED
    return Failure(
        Kind.DIED if died else Kind.ANSWERED, status, metadata.selected(error.trailing_metadata(), keys)
    )


def unreached(replica: str, *, started: bool) -> Failure:
    """No connection to a replica."""
    return Failure(Kind.UNREACHED, _lost(replica, "no connection", started=started))


def broke_protocol(replica: str, how: str) -> Failure:
    """A replica violated the .proto file; `how` completes "it ..."."""
    sentence = (
        f"replica {replica} broke the protocol: it {how}; do not use this answer, and tell whoever runs the "
        "deployment"
    )
    detail = rich_status.error_info(rich_status.REPLICA_BROKE_PROTOCOL)
    return Failure(Kind.BROKE_PROTOCOL, rich_status.build(GRPC_INTERNAL, sentence, [detail]))


def deadly(replicas: Sequence[str]) -> Failure:
    """Replicas died under one request, so it must not reach another one."""
    sentence = (
        f"request stopped: replicas died {len(replicas)} times in a row with it in flight "
        f"({', '.join(replicas)}); it may be the cause, so do not send it again unchanged"
    )
    detail = rich_status.error_info(rich_status.REPLICAS_DIED)
    return Failure(Kind.DIED, rich_status.build(GRPC_INTERNAL, sentence, [detail]))


def stopped() -> Failure:
    """The shared computation of equal requests ended early."""
    return Failure(Kind.STOPPED, _unavailable("the computation of this answer was stopped; send it again"))


def nobody(deployment: str) -> Failure:
    """No replica is ready."""
    sentence = f"{deployment} has no ready replica; {see_why(deployment)}"
    return Failure(Kind.UNREACHED, _unavailable(sentence))


def other_revision(deployment: str) -> Failure:
    """The client asked for a revision that no ready replica has."""
    sentence = (
        f"resume.revision is not served: no ready replica of {deployment} has this revision; send the "
        "request without `resume`, which starts the text again"
    )
    return Failure(Kind.UNREACHED, rich_status.build(grpc.StatusCode.FAILED_PRECONDITION, sentence))


def _lost(replica: str, cause: str, *, started: bool) -> status_pb2.Status:
    if started:
        return _unavailable(
            f"replica {replica} was lost in the middle of the answer ({cause}), and no other replica of its "
            "revision could go on; what arrived is valid, and sending the request again starts it anew"
        )
    return _unavailable(f"replica {replica} cannot be reached ({cause}); send the request again")


def _unavailable(sentence: str) -> status_pb2.Status:
    return rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, sentence, routing.RETRY_AFTER_S)
