"""Carries one request to a replica and the answer back, message by message; replays what a replica leaves.

Messages pass through as bytes and are not buffered here: the next one is read only when the client's
connection took the last one, so that HTTP/2 flow control reaches from the client to the worker. Of Generate
the tokens are noted on the way (`progress`): where a replica is lost, another one of the same revision goes
on behind them, and the client sees a pause at most.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from opentelemetry import trace

from moe_api import rich_status, spans, telemetry
from moe_operator.frontend import routing
from moe_operator.frontend.endpoints import Endpoint
from moe_operator.frontend.holding import Hold
from moe_operator.frontend.progress import Progress
from moe_operator.frontend.replicas import Lease, Replicas

Context = grpc.aio.ServicerContext[Any, bytes]
_Pairs = tuple[tuple[str, str | bytes], ...]

ROUTING_REPLICA: Final = "moe.routing.replica"
ROUTING_ADDRESS: Final = "moe.routing.address"
ROUTING_CANDIDATES: Final = "moe.routing.candidates"
ROUTING_ATTEMPT: Final = "moe.routing.attempt"
ROUTING_REASON: Final = "moe.routing.reason"
ROUTING_REPLAYED: Final = "moe.routing.replayed_tokens"

# Another replica may do what one answers so: it is lost, or it changed its revision under us.
_ELSEWHERE: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION})
# A stream that has begun waits for a place rather than be cut.
_ELSEWHERE_BEGUN: Final = _ELSEWHERE | {grpc.StatusCode.RESOURCE_EXHAUSTED}
_LOOK_AGAIN_S: Final = 1.0

# Asking which model is served does not start it.
_NOT_WORTH_A_REPLICA: Final = "/GetModel"

# Belong to one connection or one call, and are set anew on the next.
_HOP_KEYS: Final = frozenset({"user-agent", "content-type", "te", "host", "traceparent", "tracestate"})
_RESERVED_PREFIXES: Final = (":", "grpc-")


@dataclasses.dataclass(frozen=True)
class _Failure:
    """How an attempt ended that did not succeed.

    Attributes:
        status: what the replica, or the connection to it, said.
        metadata: trailing metadata to pass on.
    """

    status: status_pb2.Status
    metadata: _Pairs = ()

    @property
    def code(self) -> grpc.StatusCode:
        return rich_status.status_code(self.status)


class Forwarder:
    """Forwards the calls of one service to the replicas.

    Args:
        replicas: where requests may go.
        tracer: for the server span of every call.
        hold: where requests wait while there is no replica; names the deployment.
        patience_s: how long a request or stream whose replica was lost waits for another one.
    """

    def __init__(
        self,
        replicas: Replicas,
        tracer: trace.Tracer,
        hold: Hold,
        patience_s: float = routing.PATIENCE_S,
    ) -> None:
        self._replicas = replicas
        self._tracer = tracer
        self._hold = hold
        self._patience_s = patience_s

    def routes(self) -> list[tuple[Endpoint, int]]:
        """Where requests may go now, and how many of ours run there."""
        return self._replicas.routes()

    async def forward(self, method: str, request: Message, context: Context) -> None:
        """Answers one call; `method` is ``package.Service/Method``."""
        with spans.server_span(self._tracer, context, method) as span:
            failure = await self._held(method, span)
            if failure is None:
                failure = await self._attempts(method, request, context, span)
            if failure is not None:
                await _give_up(failure, context)

    async def _held(self, method: str, span: trace.Span) -> _Failure | None:
        """Waits for a replica, where the call is worth one; says why it has to end before there is one."""
        if len(self._replicas) or method.endswith(_NOT_WORTH_A_REPLICA):
            return None
        span.add_event("hold", {"message": "no replica is ready; the request waits for one"})
        status = await self._hold.until_replica()
        return None if status is None else _Failure(status)

    async def _attempts(
        self, method: str, request: Message, context: Context, span: trace.Span
    ) -> _Failure | None:
        progress, failure = Progress(request), None
        trials = routing.Trials(time.monotonic(), patience_s=self._patience_s)
        while True:
            before = progress.messages
            with self._replicas.lease(trials.tried, progress.bound_to) as lease:
                if lease is not None:
                    _record(span, lease, trials.attempts + 1, progress)
                    failure = await self._attempt(method, progress, context, span, lease)
            if lease is None:
                wait = self._wait_for_another(trials, progress)
                trials = trials.all_over()
            elif failure is None or progress.finished:
                return None
            else:
                progressed = progress.messages > before
                trials = trials.after(lease.endpoint.name, progressed=progressed, now=time.monotonic())
                wait = _wait_before_next(failure, trials, progress, context.time_remaining())
            if wait is None:
                return failure or self._nobody()
            await (self._replicas.change(wait) if lease is None else asyncio.sleep(wait))

    def _wait_for_another(self, trials: routing.Trials, progress: Progress) -> float | None:
        """Seconds, at most, to wait for a replica to come; None: not at all."""
        left_s = trials.left_s(time.monotonic()) if progress.resumable else 0.0
        return min(left_s, _LOOK_AGAIN_S) or None

    async def _attempt(
        self, method: str, progress: Progress, context: Context, span: trace.Span, lease: Lease
    ) -> _Failure | None:
        request = progress.request(lease.endpoint.revision)
        call = _call(method, request, context, span, lease.channel)
        try:
            async for message in call:
                await context.write(message)
                progress.take(message)
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            failure = _explain(error, lease, started=progress.started)
            if failure.code is grpc.StatusCode.UNAVAILABLE:
                self._replicas.report_failure(lease.endpoint)
            return failure
        finally:
            call.cancel()  # does nothing to a call that has ended
        self._replicas.report_success(lease.endpoint)
        return None

    def _nobody(self) -> _Failure:
        sentence = f"no worker of {self._hold.deployment} is ready; try again, or see `moe status`"
        return _Failure(_unavailable(sentence))


def _wait_before_next(
    failure: _Failure, trials: routing.Trials, progress: Progress, remaining_s: float | None
) -> float | None:
    """Seconds to wait before another replica is asked; None where the failure is the answer."""
    if not progress.started:
        return routing.backoff_s(trials.attempts, remaining_s) if failure.code in _ELSEWHERE else None
    if failure.code not in _ELSEWHERE_BEGUN or not progress.resumable:
        return None
    return routing.replay_after_s(trials, time.monotonic())


def _call(
    method: str, request: Message, context: Context, span: trace.Span, channel: grpc.aio.Channel
) -> grpc.aio.UnaryStreamCall[Message, bytes]:
    """On the wire a unary answer is a stream of one message, so one way of calling serves both."""
    serialize: Callable[[Message], bytes] = type(request).SerializeToString
    multicallable: grpc.aio.UnaryStreamMultiCallable[Message, bytes] = channel.unary_stream(
        f"/{method}", request_serializer=serialize
    )
    metadata = telemetry.inject(_passed_on(context.invocation_metadata()), trace.set_span_in_context(span))
    return multicallable(request, timeout=context.time_remaining(), metadata=metadata)


def _record(span: trace.Span, lease: Lease, attempt: int, progress: Progress) -> None:
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


def _explain(
    error: grpc.aio.AioRpcError | asyncio.CancelledError, lease: Lease, *, started: bool
) -> _Failure:
    """Puts what gRPC reports of an attempt into words for the client.

    Raises:
        asyncio.CancelledError: our own client went away.
    """
    if isinstance(error, asyncio.CancelledError):
        # grpc.aio raises this, too, where the *replica* ended the call with CANCELLED, as it does to
        # what still runs when its grace period is over.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise error
        return _Failure(_died(lease, "it was stopped", started=started))
    status = rich_status.from_error(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE and not status.details:
        return _Failure(_died(lease, error.details() or "connection lost", started=started))
    return _Failure(status, _passed_on(error.trailing_metadata()))


def _died(lease: Lease, cause: str, *, started: bool) -> status_pb2.Status:
    name = lease.endpoint.name
    if started:
        return _unavailable(
            f"replica {name} was lost in the middle of the answer ({cause}), and no other replica of its "
            "revision could go on; what arrived is valid, and sending the request again starts it anew"
        )
    return _unavailable(f"replica {name} cannot be reached ({cause}); send the request again")


def _unavailable(sentence: str) -> status_pb2.Status:
    return rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, sentence, routing.RETRY_AFTER_S)


async def _give_up(failure: _Failure, context: Context) -> None:
    metadata = tuple(pair for pair in failure.metadata if pair[0] != rich_status.DETAILS_KEY)
    details = (
        ((rich_status.DETAILS_KEY, failure.status.SerializeToString()),) if failure.status.details else ()
    )
    await context.abort(failure.code, failure.status.message, (*metadata, *details))


def _passed_on(metadata: Any) -> _Pairs:
    """What callers and workers say to each other beyond what gRPC itself puts there."""
    return tuple(
        (key, value)
        for key, value in metadata or ()
        if key not in _HOP_KEYS and (not key.startswith(_RESERVED_PREFIXES) or key == rich_status.DETAILS_KEY)
    )
