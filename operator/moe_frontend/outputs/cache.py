"""The output cache of a frontend: equal requests are computed once. Belongs to one event loop."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Generic

from opentelemetry import trace

from moe_api.supervision import Supervisor
from moe_api.writing import WRITE_TIMEOUT_S, Messages
from moe_frontend.outputs.answer import Saving, answer_of
from moe_frontend.outputs.flight import F, Flight
from moe_frontend.outputs.measures import CacheMeasures
from moe_frontend.outputs.store import Store

_LOG: Final = logging.getLogger(__name__)
RESULT: Final = "moe.cache.output"
"""Span attribute: hit, miss, or shared (followed an equal request under way)."""
SAVED_TOKENS: Final = "moe.cache.saved_tokens"
SAVED_SECONDS: Final = "moe.cache.saved_seconds"
"""Span attributes of hits and shared answers, as `Saving`."""

Compute = Callable[[Flight[F]], Awaitable[tuple[F | None, str]]]
"""Writes an answer to a flight; returns why it is incomplete, or None, and the revision of the replica."""


class OutputCache(Generic[F]):
    """Answers requests from stored answers and shares computations.

    Args:
        store: holds the answers.
        supervisor: runs the computations.
        stopped: the failure of an answer whose computation ended early.
        patience_s: nobody joins a computation that has waited as long for its readers: they read nothing,
            and would hold it for ever if others that read nothing came in time.

    Attributes:
        measures: what it did, by class of tenants.
    """

    def __init__(
        self, store: Store, supervisor: Supervisor, stopped: F, patience_s: float = WRITE_TIMEOUT_S
    ) -> None:
        self._stopped = stopped
        self._patience_s = patience_s
        self._store = store
        self._supervisor = supervisor
        self._flights: dict[bytes, tuple[Flight[F], asyncio.Task[None]]] = {}
        self._revisions: frozenset[str] = frozenset()
        self._warned = False
        self.measures = CacheMeasures(store)

    def serve(self, revisions: frozenset[str]) -> None:
        """Sets the served revisions; drops answers of others.

        Who asks after a change follows no computation that began before: it may have moved to a revision
        that is not served any more. Those who follow it already still get its answer.
        """
        if "" in revisions and not self._warned:
            self._warned = True
            _LOG.warning(
                "the output cache is not used while a worker without a revision is ready: it cannot know "
                "whether answers are still the same; start all workers with --revision NAME"
            )
        if revisions != self._revisions:
            self._flights.clear()
        self._revisions = revisions
        self._store.serve(revisions)

    async def answer(
        self,
        key: bytes,
        resumed: Sequence[int],
        caller: Any,
        writer: Messages,
        span: trace.Span,
        compute: Compute[F] | None,
        tenant: str = "",
    ) -> tuple[bool, F | None]:
        """Answers a request; returns whether it did, and why the answer is incomplete, or None.

        Args:
            key: of the request.
            resumed: tokens that the client already has.
            caller: the client's context.
            writer: to the client.
            span: of the request; records whether it was a hit.
            compute: computes the answer; None: only stored answers are used.
            tenant: class of the request's tenant, for metrics.

        Raises:
            SlowReaderError: the client does not read the answer.
        """
        stored = self._store.get(key)
        message = None if stored is None else stored.behind(resumed)
        if stored is not None and message is not None:
            self._note(span, "hit", tenant)
            self._save(span, stored.saving(len(resumed)), tenant)
            await writer.write(message)
            return True, None
        if compute is None:
            self._note(span, "miss", tenant)
            return False, None
        return True, await self._fly(key, caller, writer, span, compute, tenant)

    async def _fly(
        self, key: bytes, caller: Any, writer: Messages, span: trace.Span, compute: Compute[F], tenant: str
    ) -> F | None:
        shared = key in self._flights and not self._is_stalled(self._flights[key][0])
        self._note(span, "shared" if shared else "miss", tenant)
        if not shared:
            flight: Flight[F] = Flight(caller.invocation_metadata())
            task = self._supervisor.start("output-flight", lambda: self._run(key, flight, compute, tenant))
            self._flights[key] = flight, task
        flight, task = self._flights[key]
        try:
            failure = await flight.follow(caller, writer)
            if shared and flight.saving is not None:
                self._save(span, flight.saving, tenant)
            return failure
        finally:
            if flight.deserted and not flight.ended:
                self._forget(key, flight)
                task.cancel()

    async def _run(self, key: bytes, flight: Flight[F], compute: Compute[F], tenant: str) -> None:
        if flight.ended:  # the supervisor restarts a failed flight, but its readers have their failure
            return
        failure: F | None = self._stopped
        began = time.monotonic()
        try:
            failure, revision = await compute(flight)
            seconds = time.monotonic() - began - flight.waited_s
            answer = answer_of(flight.messages, seconds) if failure is None else None
            if answer is not None:
                flight.saving = answer.saving(0)
                self._store.put(key, answer, revision, tenant)
        finally:
            self._forget(key, flight)
            flight.end(failure)

    def _is_stalled(self, flight: Flight[F]) -> bool:
        since = flight.blocked_since
        return since is not None and time.monotonic() - since >= self._patience_s

    def _forget(self, key: bytes, flight: Flight[F]) -> None:
        if key in self._flights and self._flights[key][0] is flight:
            del self._flights[key]

    def _note(self, span: trace.Span, result: str, tenant: str) -> None:
        span.set_attribute(RESULT, result)
        self.measures.lookups[tenant, result] += 1

    def _save(self, span: trace.Span, saving: Saving, tenant: str) -> None:
        span.set_attributes({SAVED_TOKENS: saving.tokens, SAVED_SECONDS: saving.seconds})
        self.measures.save(tenant, saving)
