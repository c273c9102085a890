"""Serves a request by replicas, or by the output cache; replays streams of lost replicas.

For Generate, `progress` records the emitted tokens: if a replica is lost, another one of the same revision
continues after them, and the client only sees a pause. `attempts` has one attempt at one replica.
"""

import asyncio
import logging
import random
import time
from typing import Any, Final

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from opentelemetry import trace

from moe_api import clock, rich_status, spans
from moe_api.inference.v1 import inference_pb2
from moe_api.writing import WRITE_TIMEOUT_S, SlowReaderError, Writer
from moe_frontend.discovery.endpoints import Endpoint, Served
from moe_frontend.identity.caller import current
from moe_frontend.outputs.cache import OutputCache
from moe_frontend.outputs.flight import Flight
from moe_frontend.outputs.key import key_of
from moe_frontend.policy import routing
from moe_frontend.policy.progress import Progress
from moe_frontend.policy.salt import prefix_salt
from moe_frontend.transport import bounds, failures, metadata
from moe_frontend.transport.admission import Admission, RefusedRequestError
from moe_frontend.transport.attempts import Attempts, Call, Recipient, record
from moe_frontend.transport.failures import Failure, Kind
from moe_frontend.transport.holding import Hold
from moe_frontend.transport.prompts import Prompts
from moe_frontend.transport.replicas import Lease, Replicas
from moe_frontend.transport.turns import Turns

Context = grpc.aio.ServicerContext[Any, bytes]
_LOG: Final = logging.getLogger(__name__)
_CHANCE: Final = random.random

# Another replica may succeed after these: a replica is lost, has no room, or has changed its revision.
_ELSEWHERE: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_RECHECK_S: Final = 1.0
# GetModel does not start a replica.
_NOT_WORTH_A_REPLICA: Final = "/GetModel"


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
        self._attempt = Attempts(replicas, self.prompts, keys)
        self._replicas = replicas
        self._tracer = tracer
        self._hold = hold
        self._patience_s = patience_s
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
                call = Call(method, caller, span, writer, Progress(request), asked, admitted)
                return await self._admitted(call, request)
        except RefusedRequestError as error:
            return Failure(Kind.ANSWERED, error.status)
        except SlowReaderError as error:
            return Failure(Kind.ANSWERED, error.status)

    async def _admitted(self, call: Call, request: Message) -> Failure | None:
        """Raises SlowReaderError."""
        if failure := await self._held(call):
            return failure
        if failure := self._oversize(request):  # after a wait, the served model is known only now
            return failure
        answered, failure = await self._from_outputs(call, request)
        return failure if answered else await self._compute(call)

    async def _compute(self, call: Call) -> Failure | None:
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

    async def _from_outputs(self, call: Call, request: Message) -> tuple[bool, Failure | None]:
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
                shared = Call(call.method, flight, span, flight, progress, call.asked, call.admitted)
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

    async def _held(self, call: Call) -> Failure | None:
        """Waits for a replica, except for GetModel; returns why the call ends without one, or None."""
        if len(self._replicas) or call.method.endswith(_NOT_WORTH_A_REPLICA):
            return None
        call.span.add_event("hold", {"message": "no replica is ready; the request waits for one"})
        status = await self._hold.until_replica(call.progress.size)
        return None if status is None else Failure(Kind.UNREACHED, status)

    async def _attempts(self, call: Call) -> Failure | None:
        progress, failure = call.progress, None
        trials = routing.Trials(time.monotonic(), patience_s=self._patience_s)
        while True:
            before = progress.tokens
            with self._replicas.lease(trials.tried, progress.bound_to, call.asked) as lease:
                if lease is not None:
                    record(call.span, lease, trials.attempts + 1, progress)
                    failure = await self._attempt.make(call, lease)
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


async def give_up(failure: Failure, context: Context) -> None:
    """Ends a gRPC call that failed. Raises AbortError."""
    status = failure.status
    details = ((rich_status.DETAILS_KEY, status.SerializeToString()),) if status.details else ()
    await context.abort(failure.code, status.message, (*failure.metadata, *details))
