"""Forwards a request to a replica and its response, message by message; replays streams of lost replicas.

Messages are bytes and are not buffered here: the next one is read only after the client's connection has
accepted the last one, so HTTP/2 flow control works from the client to the worker. For Generate, `progress`
records the emitted tokens: if a replica is lost, another one of the same revision continues after them, and
the client only sees a pause.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from opentelemetry import trace

from moe_api import clock, rich_status, spans, telemetry
from moe_api.clock import Timed
from moe_api.inference.v1 import inference_pb2
from moe_api.writing import WRITE_TIMEOUT_S, Messages, Sink, SlowReaderError, Writer
from moe_frontend.discovery.endpoints import Endpoint, Served
from moe_frontend.identity import audit
from moe_frontend.identity.caller import current
from moe_frontend.outputs.cache import OutputCache
from moe_frontend.outputs.flight import Flight
from moe_frontend.outputs.key import key_of
from moe_frontend.policy import routing
from moe_frontend.policy.balancing import Asked
from moe_frontend.policy.echo import ContractError
from moe_frontend.policy.progress import Progress
from moe_frontend.policy.salt import prefix_salt
from moe_frontend.transport import bounds, failures, metadata
from moe_frontend.transport.admission import Admission, Admitted, RefusedRequestError
from moe_frontend.transport.failures import Failure, Kind
from moe_frontend.transport.holding import Hold
from moe_frontend.transport.prompts import Prompts
from moe_frontend.transport.replicas import Lease, Replicas
from moe_frontend.transport.turns import Turns

Context = grpc.aio.ServicerContext[Any, bytes]
_LOG: Final = logging.getLogger(__name__)
_CHANCE: Final = random.random

ROUTING_REPLICA: Final = "moe.routing.replica"
ROUTING_ADDRESS: Final = "moe.routing.address"
ROUTING_CANDIDATES: Final = "moe.routing.candidates"
ROUTING_ATTEMPT: Final = "moe.routing.attempt"
ROUTING_REASON: Final = "moe.routing.reason"
ROUTING_REPLAYED: Final = "moe.routing.replayed_tokens"

# Another replica may succeed after these: a replica is lost, has no room, or has changed its revision.
_ELSEWHERE: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_RECHECK_S: Final = 1.0
# A worker ends a call directly after the last message of its response.
_END_S: Final = 5.0

# GetModel does not start a replica.
_NOT_WORTH_A_REPLICA: Final = "/GetModel"


_Answer = grpc.aio.UnaryStreamCall[Message, bytes]


class Recipient(Sink, Timed, Protocol):
    """The receiver of a response: the context of a gRPC call, or its equivalent of another protocol."""

    def invocation_metadata(self) -> Iterable[Any] | None:
        """Metadata of the request, keys in lower case."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Sets trailing metadata of the response."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a client, across all attempts."""

    method: str
    context: Recipient
    span: trace.Span
    writer: Messages
    progress: Progress
    asked: Asked | None
    admitted: Admitted


class Forwarder:
    """Forwards the calls of one service to the replicas.

    Args:
        replicas: the ready ones.
        tracer: for the server span of every call.
        hold: where requests wait while no replica is ready; names the deployment.
        patience_s: how long a request or stream waits for another replica after it lost one.
        keys: metadata that are forwarded between clients and workers.
        write_timeout_s: how long a message may wait for the client to read it.
        outputs: the output cache; None: there is none.

    Attributes:
        prompts: of all calls so far.
    """

    def __init__(
        self,
        replicas: Replicas,
        tracer: trace.Tracer,
        hold: Hold,
        patience_s: float = routing.PATIENCE_S,
        keys: frozenset[str] = metadata.DEFAULT_KEYS,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        outputs: "OutputCache[Failure] | None" = None,
    ) -> None:
        self._outputs = outputs
        self._admission = Admission()
        self._turns = Turns(lambda: replicas.slots, patience_s)
        replicas.listen(self._turns.changed)
        self.prompts = Prompts()
        self._replicas = replicas
        self._tracer = tracer
        self._hold = hold
        self._patience_s = patience_s
        self._keys = keys
        self._write_timeout_s = write_timeout_s

    def limit(self, admission: Admission) -> None:
        """Sets what tenants may use, before the first call; there are no limits without it."""
        self._admission = admission

    def routes(self) -> list[tuple[Endpoint, int]]:
        """The ready endpoints, with the number of requests of this frontend in flight on each."""
        return self._replicas.routes()

    @property
    def served(self) -> Served:
        """The model of the ready replicas, or of the last one that was ready."""
        return self._replicas.served

    async def until_replica(self, size: int) -> status_pb2.Status | None:
        """Waits for a replica if none is ready; returns why a request of `size` bytes ends, or None."""
        return None if len(self._replicas) else await self._hold.until_replica(size)

    async def forward(self, method: str, request: Message, context: Context) -> None:
        """Serves one gRPC call; `method` is ``package.Service/Method``."""
        with spans.server_span(self._tracer, context, method) as span:
            failure = await self.answer(method, request, context, span)
            if failure is not None:
                await give_up(failure, context)

    async def answer(
        self, method: str, request: Message, caller: Recipient, span: trace.Span
    ) -> Failure | None:
        """Serves one call of any protocol; returns why the response is incomplete, or None.

        Args:
            method: ``package.Service/Method``.
            request: of that method.
            caller: receives the messages of the response, as bytes.
            span: of the call.
        """
        if failure := self._oversize(request):
            return failure
        pairs, tenant = list(caller.invocation_metadata() or ()), current().tenant
        try:
            with self._admission.admit(tenant, prefix_salt(pairs, tenant), request) as admitted:
                asked = self._replicas.ask(request, pairs, tenant)
                writer = Writer(caller, self._write_timeout_s)
                call = _Call(method, caller, span, writer, Progress(request), asked, admitted)
                return await self._admitted(call, request)
        except RefusedRequestError as error:
            return Failure(Kind.ANSWERED, error.status)
        except SlowReaderError as error:
            return Failure(Kind.ANSWERED, error.status)

    async def _admitted(self, call: _Call, request: Message) -> Failure | None:
        """Raises SlowReaderError."""
        if failure := await self._held(call):
            return failure
        if failure := self._oversize(request):  # after a wait, the served model is known only now
            return failure
        answered, failure = await self._from_outputs(call, request)
        return failure if answered else await self._compute(call)

    async def _compute(self, call: _Call) -> Failure | None:
        """Has the request computed, when it is its tenant's turn. Raises SlowReaderError."""
        admitted = call.admitted
        if not admitted.tokens:
            return await self._attempts(call)
        try:
            use = admitted.use
            async with self._turns.slot(use.tenant, use.allowed.weight, admitted.tokens) as refusal:
                return await self._attempts(call) if refusal is None else Failure(Kind.ANSWERED, refusal)
        finally:
            self._admission.spend(admitted, call.progress.used)

    async def _from_outputs(self, call: _Call, request: Message) -> tuple[bool, Failure | None]:
        """Serves a call by the output cache; returns whether it did, and why the response is incomplete."""
        if self._outputs is None or not isinstance(request, inference_pb2.GenerateRequest):
            return False, None
        metadata_, samples = call.context.invocation_metadata(), self._replicas.served.samples
        revision, tenant = self._replicas.only_revision, call.admitted.use.tenant
        key = key_of(request, metadata_, revision, samples=samples, tenant=tenant)
        if key is None:
            return False, None

        async def compute(flight: Flight[Failure]) -> tuple[Failure | None, str]:
            progress = Progress(request)
            with self._tracer.start_as_current_span("compute", trace.set_span_in_context(call.span)) as span:
                # Each reader of a flight has a timeout of its own.
                shared = _Call(call.method, flight, span, flight, progress, call.asked, call.admitted)
                failure = await self._compute(shared)
            return failure, progress.revision

        resumed = request.resume.tokens
        return await self._outputs.answer(
            key,
            resumed,
            call.context,
            call.writer,
            call.span,
            None if resumed else compute,
            call.admitted.label,
        )

    def _oversize(self, request: Message) -> Failure | None:
        """Why no replica would accept the request, by its length alone; None if one may."""
        too_long = bounds.violations(request, self._replicas.limits)
        return Failure(Kind.ANSWERED, rich_status.invalid_argument(too_long)) if too_long else None

    async def _held(self, call: _Call) -> Failure | None:
        """Waits for a replica, except for GetModel; returns why the call ends without one, or None."""
        if len(self._replicas) or call.method.endswith(_NOT_WORTH_A_REPLICA):
            return None
        call.span.add_event("hold", {"message": "no replica is ready; the request waits for one"})
        status = await self._hold.until_replica(call.progress.size)
        return None if status is None else Failure(Kind.UNREACHED, status)

    async def _attempts(self, call: _Call) -> Failure | None:
        progress, failure = call.progress, None
        trials = routing.Trials(time.monotonic(), patience_s=self._patience_s)
        while True:
            before = progress.tokens
            with self._replicas.lease(trials.tried, progress.bound_to, call.asked) as lease:
                if lease is not None:
                    _record(call.span, lease, trials.attempts + 1, progress)
                    failure = await self._attempt(call, lease)
            if lease is None:
                if ended := await self._wait_for_another(failure, trials, progress):
                    return ended
                trials = trials.all_over()
                continue
            if failure is None:
                return None
            trials = _counted(trials, lease, failure, progress.tokens - before)
            if trials.deadly:
                return failures.deadly(trials.dead)
            wait = _wait_before_next(failure, trials, progress, clock.remaining_s(call.context))
            if wait is None:
                return failure
            await asyncio.sleep(wait)

    async def _wait_for_another(
        self, failure: Failure | None, trials: routing.Trials, progress: Progress
    ) -> Failure | None:
        """Waits a while for a change of replicas; returns why the call ends if it may not wait."""
        if failure is None and len(self._replicas):  # none was tried, so none has the required revision
            return failures.other_revision(self._hold.deployment)
        full = failure is not None and failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        wait = min(trials.left_s(time.monotonic()), _RECHECK_S)
        if not progress.resumable or (full and not progress.started) or not wait:
            return self._unanswered(failure, progress)
        with self._hold.place(progress.size) as refusal:
            if refusal is not None:
                return failure or Failure(Kind.UNREACHED, refusal)
            await self._replicas.change(wait)
        return None

    def _unanswered(self, failure: Failure | None, progress: Progress) -> Failure:
        """The failure for the client if no replica is left to try."""
        lost = failure is not None and failure.kind is not Kind.ANSWERED and not progress.started
        if failure is None or (lost and not len(self._replicas)):
            return failures.nobody(self._hold.deployment)
        return failure

    async def _attempt(self, call: _Call, lease: Lease) -> Failure | None:
        """One attempt; None if the client has its response."""
        before = call.progress.tokens
        try:
            failure = await self._exchange(call, lease)
        finally:
            usage = call.progress.usage
            audit.count(0 if usage is None else usage.prompt_tokens, call.progress.tokens - before)
        if failure is None:
            self._replicas.report_success(lease.endpoint)
            self.prompts.count(call.admitted.label, call.progress.usage)
            return None
        if failure.kind is Kind.BROKE_PROTOCOL:
            _LOG.warning("%s", failure.status.message)
            self._replicas.distrust(lease.endpoint)
            return failure
        if failure.code is grpc.StatusCode.UNAVAILABLE:
            self._replicas.report_failure(lease.endpoint)
        return None if call.progress.finished else failure

    async def _exchange(self, call: _Call, lease: Lease) -> Failure | None:
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

    def _send(self, call: _Call, lease: Lease) -> _Answer:
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


async def _pass_on(answer: _Answer, call: _Call, lease: Lease) -> None:
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


def _counted(trials: routing.Trials, lease: Lease, failure: Failure, tokens: int) -> routing.Trials:
    return trials.after(
        lease.endpoint.name,
        progressed=tokens > 0,
        now=time.monotonic(),
        died=failure.kind is Kind.DIED,
        tokens=tokens,
    )


def _wait_before_next(
    failure: Failure, trials: routing.Trials, progress: Progress, remaining_s: float | None
) -> float | None:
    """Seconds to wait before another replica is tried; None if the failure is final."""
    if failure.code not in _ELSEWHERE:
        return None
    if not progress.started:
        return routing.backoff_s(trials.attempts, remaining_s, _CHANCE())
    return routing.replay_after_s(trials, time.monotonic(), _CHANCE()) if progress.resumable else None


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


async def give_up(failure: Failure, context: Context) -> None:
    """Ends a gRPC call that failed. Raises AbortError."""
    status = failure.status
    details = ((rich_status.DETAILS_KEY, status.SerializeToString()),) if status.details else ()
    await context.abort(failure.code, status.message, (*failure.metadata, *details))
