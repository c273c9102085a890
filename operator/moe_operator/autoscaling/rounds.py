"""The scaling of one deployment: polls, lets the scaler decide, reports, and stores the state."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from opentelemetry import trace

from moe_api.supervision import Supervisor
from moe_operator.autoscaling import reporting, scaling_history, storage
from moe_operator.autoscaling.metrics import ScalingMetrics
from moe_operator.autoscaling.model.history import HistoryError
from moe_operator.autoscaling.polling import Poller
from moe_operator.autoscaling.scaler import MINUTE_S, Memory, Outcome, Scaler
from moe_operator.autoscaling.subject import Subject
from moe_operator.errors import MoEOperatorError, PermanentError, ReadForbiddenError
from moe_operator.executor import execute
from moe_operator.kube.client import Cluster
from moe_operator.planner.conditions import Verdict, dated
from moe_operator.planner.decision import Decision
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Identity, Name
from moe_operator.resources.scaling_spec import Mode
from moe_operator.resources.scaling_status import SCALING_ACTIVE, ScalingStatus
from moe_operator.resources.status import Condition, Status
from moe_operator.rpc.pods import PodClient
from moe_operator.settings import Settings

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ScaledFactory:
    """What the scaling of all deployments shares; starts and retires the scaling of one."""

    cluster: Cluster
    client: PodClient
    poller: Poller
    settings: Settings
    threads: Executor
    """For requests to the API server."""
    laboratory: Executor
    """One thread for fitting forecast models, so that it never uses more than one core."""
    decided: Callable[[Name], None]
    """Called after a decision was written into the status, to reconcile."""
    metrics: ScalingMetrics
    tracer: trace.Tracer
    supervisor: Supervisor
    """Runs background tasks."""

    async def load(self, subject: Subject) -> Scaled:
        """The scaling of a deployment, with its stored state."""
        memory, unread = None, ""
        try:
            memory = await self.stored(subject.deployment.identity)
        except (HistoryError, PermanentError, ReadForbiddenError) as error:
            logger.warning("%s: %s; scaling starts without history", subject.deployment.name, error)
            unread = f"{error}; correct or delete it" if isinstance(error, HistoryError) else str(error)
        scaler = Scaler(subject.deployment.wanted_replicas, memory, subject.spec.capacity_prior)
        return Scaled(self, subject, scaler, memory.whole_until if memory else 0, unread=unread)

    async def stored(self, identity: Identity) -> Memory | None:
        """The stored state, as far as it is valid; raises errors of `storage.load` and HistoryError."""
        return await self.call(self._stored, identity, int(self.poller.now() // MINUTE_S))

    def _stored(self, identity: Identity, minute: int) -> Memory | None:
        kept, recent = storage.load(self.cluster, identity)
        whole = scaling_history.memory(kept, identity)
        if whole is None:
            return None
        try:
            whole = scaling_history.with_recent(whole, recent, identity)
        except HistoryError as error:
            logger.warning("%s: %s; scaling starts without the latest minutes", identity.name, error)
        return scaling_history.without_future(whole, minute)

    async def retire(self, deployment: Deployment) -> None:
        """Removes scaling information from the status of a deployment that does not scale any more."""
        self.metrics.forget(deployment.identity.namespace, deployment.name)
        is_off, before = deployment.spec.scaling is not None, deployment.status
        wanted = _condition(deployment, reporting.OFF, before) if is_off else None
        if before.scaling is not None or before.condition(SCALING_ACTIVE) != wanted:
            await self.call(storage.write_status, self.cluster, deployment.identity, None, wanted)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Calls a blocking function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)


class Scaled:
    """The scaling of one deployment. Belongs to one event loop.

    Args:
        factory: what all deployments share.
        subject: the deployment as last observed.
        scaler: its state.
        whole_until: the minute before which all rates are in the stored ScalingHistory; 0 if there is none.
        unread: why a stored state could not be read: nothing replaces it; empty if it was, or there is none.
    """

    def __init__(
        self,
        factory: ScaledFactory,
        subject: Subject,
        scaler: Scaler,
        whole_until: int = 0,
        *,
        unread: str = "",
    ) -> None:
        self.outdated = False
        """The stored state, which could not be read before, can be read now: load it."""
        self._unread = unread
        self._with = factory
        self._scaler = scaler
        self._whole_until = whole_until
        self._status = subject.deployment.status.scaling
        self._condition = subject.deployment.status.condition(SCALING_ACTIVE)
        self._kept_at = time.monotonic()
        self._learning: asyncio.Task[None] | None = None
        self._awaits_request = False

    async def round(self, subject: Subject) -> None:
        """Polls the replicas, decides, and reports."""
        reading = await self._with.poller.read(subject)
        settings = self._with.settings
        outcome = self._scaler.step(subject, reading, self._with.poller.now(), settings.scaling_speed)
        self._awaits_request = outcome.sizing.replicas == 0 and not subject.ready and reading.held == 0
        self._with.metrics.record(subject.deployment.identity, outcome)
        await self._report(subject, outcome)
        if self._learning is None or self._learning.done():
            self._learning = self._with.supervisor.start("learning", self._learn, subject.deployment.name)
        if time.monotonic() >= self._kept_at + settings.history_seconds / settings.scaling_speed:
            await self.keep(subject)

    async def until_next(self, subject: Subject) -> None:
        """Waits for the next round. If there is no replica, a first request ends the wait."""
        pause = self._with.settings.sample_seconds / self._with.settings.scaling_speed
        end = time.monotonic() + pause
        if self._awaits_request and await self._with.poller.first_held(subject, pause):
            return
        await asyncio.sleep(end - time.monotonic())

    async def keep(self, subject: Subject) -> None:
        """Writes the state into the ScalingHistory; scaling continues if that fails."""
        self._kept_at = time.monotonic()
        identity = subject.deployment.identity
        if self.outdated or (self._unread and not await self._may_replace(identity)):
            return
        memory = self._scaler.memory()
        due = await self._with.call(scaling_history.due, identity, memory, subject.uids, self._whole_until)
        try:
            await self._with.call(storage.save, self._with.cluster, due.manifest)
            self._whole_until = due.whole_until
        except MoEOperatorError as error:
            logger.warning("%s: cannot store the scaling history: %s", identity.name, error)

    async def _may_replace(self, identity: Identity) -> bool:
        """Whether the stored state that could not be read is gone. Once it can be read, it is loaded."""
        try:
            stored = await self._with.stored(identity)
        except MoEOperatorError as error:
            logger.warning("%s: the scaling history is not stored: %s", identity.name, error)
            return False
        self._unread, self.outdated = "", stored is not None
        return stored is None

    def close(self) -> None:
        """Stops fitting models."""
        if self._learning is not None:
            self._learning.cancel()

    async def _learn(self) -> None:
        """Fits models in a thread; if that fails, scaling continues with the present models."""
        job = self._scaler.upkeep()
        if job is not None:
            adopt = await asyncio.get_running_loop().run_in_executor(self._with.laboratory, job)
            adopt()

    async def _report(self, subject: Subject, outcome: Outcome) -> None:
        """Writes the status if the decision or the condition changed, otherwise once a minute."""
        deployment, before, now = subject.deployment, self._status, datetime.now(UTC)
        status = reporting.status(subject, outcome, before, now)
        last = Status(conditions=(self._condition,) if self._condition else ())
        condition = _condition(deployment, reporting.verdict(subject, outcome, self._unread), last, now)
        if not (_news(before, status, self._condition, condition) or outcome.closed):
            return
        if (status, condition) == (before, self._condition):
            return
        await self._with.call(
            storage.write_status, self._with.cluster, deployment.identity, status, condition
        )
        self._status, self._condition = status, condition
        if before is None or before.desired_replicas != status.desired_replicas:
            await self._announce(subject, reporting.announcement(subject, outcome, before))

    async def _announce(self, subject: Subject, decision: Decision | None) -> None:
        """Triggers a reconcile that executes the decision; reports it as a span, a log line and an Event."""
        identity = subject.deployment.identity
        if subject.scaling.mode is Mode.AUTO:
            self._with.decided(Name(identity.namespace, identity.name))
        if decision is None:
            return
        with self._with.tracer.start_as_current_span("scale") as span:
            span.set_attributes(
                {"k8s.namespace.name": identity.namespace, f"{names.GROUP}.name": identity.name}
            )
            span.add_event(decision.reason, {"message": decision.message})
        logger.info("%s/%s: %s: %s", identity.namespace, identity.name, decision.reason, decision.message)
        try:
            await self._with.call(execute.post, self._with.cluster, identity, decision, datetime.now(UTC))
        except MoEOperatorError as error:
            # Events are only for people; the decision is executed even without one.
            logger.warning("%s/%s: no event was created: %s", identity.namespace, identity.name, error)


def _condition(
    deployment: Deployment, verdict: Verdict, before: Status, now: datetime | None = None
) -> Condition:
    found = {SCALING_ACTIVE: verdict}
    (condition,) = dated(found, before, deployment.identity.generation, now or datetime.now(UTC))
    return condition


def _news(
    before: ScalingStatus | None, status: ScalingStatus, last: Condition | None, condition: Condition
) -> bool:
    """Whether the number of replicas, the condition or the spec changed, which is reported at once."""
    if before is None or last is None or last.observed_generation != condition.observed_generation:
        return True
    decided = before.desired_replicas != status.desired_replicas
    return decided or (last.status, last.reason) != (condition.status, condition.reason)
