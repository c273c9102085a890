"""One attempt at one replica: sends the request and forwards its response, message by message.

Messages are bytes and are not buffered here: the next one is read only after the client's connection has
accepted the last one, so HTTP/2 flow control works from the client to the worker.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import grpc
from google.protobuf.message import Message
from opentelemetry import trace

from moe_api import clock, telemetry
from moe_api.clock import Timed
from moe_api.writing import Messages, Sink
from moe_frontend.identity import audit
from moe_frontend.policy.balancing import Asked
from moe_frontend.policy.echo import ContractError
from moe_frontend.policy.progress import Progress
from moe_frontend.transport import failures, metadata
from moe_frontend.transport.admission import Admitted
from moe_frontend.transport.failures import Failure, Kind
from moe_frontend.transport.prompts import Prompts
from moe_frontend.transport.replicas import Lease, Replicas

_LOG: Final = logging.getLogger(__name__)

ROUTING_REPLICA: Final = "moe.routing.replica"
ROUTING_ADDRESS: Final = "moe.routing.address"
ROUTING_CANDIDATES: Final = "moe.routing.candidates"
ROUTING_ATTEMPT: Final = "moe.routing.attempt"
ROUTING_REASON: Final = "moe.routing.reason"
ROUTING_REPLAYED: Final = "moe.routing.replayed_tokens"

# A worker ends a call directly after the last message of its response.
_END_S: Final = 5.0

_Answer = grpc.aio.UnaryStreamCall[Message, bytes]


class Recipient(Sink, Timed, Protocol):
    """The receiver of a response: the context of a gRPC call, or its equivalent of another protocol."""

    def invocation_metadata(self) -> Iterable[Any] | None:
        """Metadata of the request, keys in lower case."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Sets trailing metadata of the response."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a client, across all attempts."""

    method: str
    context: Recipient
    span: trace.Span
    writer: Messages
    progress: Progress
    asked: Asked | None
    admitted: Admitted


class Attempts:
    """Makes attempts, and tells `replicas` how they ended.

    prompts: counts those of completed responses. keys: metadata that are forwarded between clients and
    workers.
    """

    def __init__(self, replicas: Replicas, prompts: Prompts, keys: frozenset[str]) -> None:
        self._replicas = replicas
        self._prompts = prompts
        self._keys = keys

    async def make(self, call: Call, lease: Lease) -> Failure | None:
        """One attempt; None if the client has its response."""
        before = call.progress.tokens
        try:
            failure = await self._exchange(call, lease)
        finally:
            usage = call.progress.usage
            audit.count(0 if usage is None else usage.prompt_tokens, call.progress.tokens - before)
        if failure is None:
            self._replicas.report_success(lease.endpoint)
            self._prompts.count(call.admitted.label, call.progress.usage)
            return None
        if failure.kind is Kind.BROKE_PROTOCOL:
            _LOG.warning("%s", failure.status.message)
            self._replicas.distrust(lease.endpoint)
            return failure
        if failure.code is grpc.StatusCode.UNAVAILABLE:
            self._replicas.report_failure(lease.endpoint)
        return None if call.progress.finished else failure

    async def _exchange(self, call: Call, lease: Lease) -> Failure | None:
        """Sends the request and forwards the response, as far as it arrives.

        Raises:
            SlowReaderError: the client does not read it.
        """
        name, progress = lease.endpoint.name, call.progress
        if not await lease.connected():
            return failures.unreached(name, started=progress.started)
        answer = self._send(call, lease)
        try:
            await _pass_on(answer, call, lease)
            if said := metadata.selected(await answer.trailing_metadata(), self._keys):
                call.context.set_trailing_metadata(said)
        except ContractError as error:
            return failures.broke_protocol(name, str(error))
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            return failures.of_call(error, name, self._keys, started=progress.started)
        finally:
            answer.cancel()  # does nothing to a call that has ended
        return None

    def _send(self, call: Call, lease: Lease) -> _Answer:
        """On the wire a unary response is a stream of one message, so one kind of call serves both."""
        request = call.progress.request(lease.endpoint.revision)
        serialize: Callable[[Message], bytes] = type(request).SerializeToString
        multicallable: grpc.aio.UnaryStreamMultiCallable[Message, bytes] = lease.channel.unary_stream(
            f"/{call.method}", request_serializer=serialize
        )
        forwarded = metadata.selected(call.context.invocation_metadata(), self._keys)
        told = (*forwarded, *call.admitted.tenancy.metadata())
        traced = telemetry.inject(told, trace.set_span_in_context(call.span))
        return multicallable(request, timeout=clock.remaining_s(call.context), metadata=traced)


async def _pass_on(answer: _Answer, call: Call, lease: Lease) -> None:
    """Forwards the messages of a response until its end.

    Raises:
        ContractError: the replica violates the .proto file.
        SlowReaderError: the client does not read it.
        grpc.aio.AioRpcError: the replica, or the connection to it, failed.
    """
    progress = call.progress
    with contextlib.suppress(TimeoutError):  # the client has its complete response
        async with asyncio.timeout(None) as limit:
            async for message in answer:
                lease.prompt_done()
                for ready in progress.take(message):
                    await call.writer.write(ready)
                if progress.finished:
                    limit.reschedule(asyncio.get_running_loop().time() + _END_S)
    progress.end()


def record(span: trace.Span, lease: Lease, attempt: int, progress: Progress) -> None:
    """Names the replica of an attempt, and why it was chosen, in the span of the call."""
    attributes: dict[str, str | int] = {
        ROUTING_REPLICA: lease.decision.replica,
        ROUTING_ADDRESS: lease.endpoint.address,
        ROUTING_CANDIDATES: lease.decision.candidates,
        ROUTING_ATTEMPT: attempt,
        ROUTING_REASON: lease.decision.reason,
    }
    if progress.started:
        attributes[ROUTING_REPLAYED] = progress.tokens
    span.set_attributes(attributes)
    span.add_event("route", {**attributes, "message": lease.decision.message})
