"""One reconcile: gather and plan (`planning`), execute, report (`reporting`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

from opentelemetry import trace
from opentelemetry.metrics import get_meter

from moe_operator.controller.deployment_metrics import DeploymentMetrics
from moe_operator.controller.gather import unlabelled
from moe_operator.controller.planning import Planning
from moe_operator.controller.reporting import Reporting
from moe_operator.controller.work_metrics import WorkMetrics
from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    InvalidSpecError,
    OwnerUnknownError,
    PermanentError,
    ReadForbiddenError,
    RetryableError,
)
from moe_operator.executor import execute
from moe_operator.executor.certificates import Certificates
from moe_operator.kube import peering
from moe_operator.kube.client import Cluster
from moe_operator.observed.observation import Observed
from moe_operator.planner import host_paths
from moe_operator.planner.plan import Plan
from moe_operator.planner.status_report import invalid, refused
from moe_operator.render.objects import Key
from moe_operator.render.worker import recipe
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Identity, Name, identity, parse, parse_status
from moe_operator.resources.status import READY, Status
from moe_operator.rpc.dialing import PLAINTEXT, Dialer
from moe_operator.rpc.leader import drain
from moe_operator.rpc.together import ask
from moe_operator.settings import Settings

logger = logging.getLogger(__name__)

_AFTER_DEADLINE_SECONDS = 0.5
"""Times in the status are whole seconds: after this many more, the deadline has certainly passed."""


class Watcher(Protocol):
    """Listeners for the results of reconciles."""

    def saw(self, deployment: Deployment, observed: Observed) -> None:
        """Called with a deployment and its objects."""

    def gone(self, name: Name) -> None:
        """Called with a deleted deployment."""


@dataclass
class Reconciler:
    """Brings deployments closer to their specs. Blocking; may run in several threads at once."""

    cluster: Cluster
    settings: Settings
    rank: peering.Rank
    """The peering of this process."""
    clock: Callable[[], datetime]
    active: Callable[[Collection[str]], Mapping[str, int]]
    """Returns the active requests of workers by address, without workers that do not respond."""
    tracer: trace.Tracer = field(default_factory=lambda: trace.get_tracer(__name__))
    watcher: Watcher | None = None
    """Receives the observations of every reconcile: scaling."""
    metrics: WorkMetrics = field(default_factory=lambda: WorkMetrics(get_meter(__name__)))
    states: DeploymentMetrics = field(default_factory=lambda: DeploymentMetrics(get_meter(__name__)))
    certificates: Certificates | None = None
    """Issues certificates for mutual TLS; None in tests without it."""
    dialer: Dialer = PLAINTEXT

    def __post_init__(self) -> None:
        self._planning = Planning(self.cluster, self.settings, self.clock, self.active, self.dialer)
        self._reporting = Reporting(self.cluster, self.clock, self.metrics, self.states)
        self._hindered: dict[Name, float] = {}
        """Since when nothing but what heals by itself stops a deployment (time.monotonic)."""

    def reconcile(self, name: Name) -> float | None:
        """Reconciles one deployment.

        Returns the seconds until the next reconcile, or None if the deployment was deleted. Raises
        RetryableError if something failed that may succeed later.
        """
        with self.tracer.start_as_current_span("reconcile") as span, self.metrics.reconcile():
            span.set_attributes({"k8s.namespace.name": name.namespace, f"{names.GROUP}.name": name.name})
            if self.rank.outranked(self.clock()):
                span.set_attribute(f"{names.GROUP}.outranked", value=True)
                self.states.forget(name)
                return self.settings.recheck_seconds
            body = self.cluster.get(names.KIND, name.namespace, name.name)
            if body is None or "deletionTimestamp" in body["metadata"]:
                self.states.forget(name)
                self._hindered.pop(name, None)
                if self.watcher is not None:
                    self.watcher.gone(name)
                return None
            try:
                deployment = replace(parse(body), operator_namespace=self.settings.namespace)
                return self._advance(deployment, span)
            except InvalidSpecError as error:
                before = parse_status(body)
                self._reporting.blocked(
                    identity(body), before, invalid(before, identity(body), str(error), self.clock())
                )
            except PermanentError as error:
                logger.warning("%s: %s; retrying in %.0f s", name, error, self.settings.resync_seconds)
            # Policies and CRDs change without an event here, so not only an edit helps.
            return self.settings.resync_seconds

    def _advance(self, deployment: Deployment, span: trace.Span) -> float:
        roots = [root for root in self.settings.model_roots.split(",") if root]
        if wrong := host_paths.refusal(deployment, roots):
            raise InvalidSpecError(wrong)
        observed = self._gathered(deployment)
        uncertified = self._certify(deployment, observed)
        deployment, observed, todo = self._planning.planned(deployment, observed)
        while others := unlabelled(self.cluster, deployment.identity.namespace, todo.apply):
            observed = replace(observed, children={**observed.children, **others})
            deployment, observed, todo = self._planning.planned(deployment, observed)
        if todo.sound:
            self.cluster.note((observed.children[name].content for name in todo.sound), recipe(deployment))
        if self.watcher is not None:
            self.watcher.saw(deployment, observed)
        _describe(span, deployment, todo)
        if todo.creates and not self._is_current(deployment.identity):
            raise ChangedMeanwhileError(
                "conflict: the deployment was modified or deleted concurrently; retrying"
            )
        self._drain(deployment, todo.drain)
        refusals = [*uncertified, *self._execute(deployment.identity, todo)]
        if self._is_brief(deployment.identity, refusals):
            self._report_start(deployment, todo, refusals)
            raise refusals[0]
        if refusals:
            return self._refused(deployment, todo, refusals)
        self._reporting.write(deployment.identity, deployment.status, todo.status)
        self._reporting.announce(deployment.identity, todo.news)
        self._record(_with_desired(deployment, todo.status))
        opened = {gate.pod for gate in todo.gates}
        if any(pod.name not in opened for pod in todo.unrouted):
            return self.settings.routing_seconds
        return self._until_next(todo)

    def _execute(self, who: Identity, todo: Plan) -> list[ApplyRefusedError | ApplyForbiddenError]:
        """Executes the plan, and reports what was done, also where the rest failed; returns the refusals."""
        end, done = time.monotonic() + self.settings.reconcile_seconds, set[Key]()
        try:
            return execute.execute(self.cluster, who, todo, lambda: time.monotonic() < end, done.add)
        finally:
            self._reporting.announce(who, todo.deeds(done))

    def _record(self, deployment: Deployment) -> None:
        """Writes the scaling decision into spec.replicas; no other step depends on that.

        It does not overwrite a later change by others: scaling may be off by now.
        """
        replicas, who = deployment.replicas_to_record, deployment.identity
        if replicas is None:
            return
        body = self.cluster.refresh(names.KIND, who.namespace, who.name)
        if body is None or identity(body) != who:
            return  # the event of that change causes the next reconcile
        try:
            self.cluster.scale(who.namespace, who.name, replicas, body["metadata"]["resourceVersion"])
        except (ApplyRefusedError, ApplyForbiddenError) as error:
            logger.warning("%s: spec.replicas does not follow scaling: %s", deployment.name, error)

    def _until_next(self, todo: Plan) -> float:
        """Seconds until the next reconcile if no event comes earlier."""
        pause = self.settings.recheck_seconds if todo.recheck else self.settings.resync_seconds
        for moment in (todo.deadline, todo.due):
            if moment is not None:
                left = max((moment - self.clock()).total_seconds(), 0) + _AFTER_DEADLINE_SECONDS
                pause = min(pause, left)
        return pause

    def _gathered(self, deployment: Deployment) -> Observed:
        """The observed objects. If reading is forbidden, the status says so and keeps its other content."""
        try:
            return self._planning.gathered(deployment)
        except ReadForbiddenError as error:
            who, before = deployment.identity, deployment.status
            known = before.without_scaling().model_copy(update={"observed_generation": who.generation})
            self._reporting.blocked(
                who, before, refused(before, known, str(error), self.clock(), "ReadForbidden")
            )
            raise

    def _certify(
        self, deployment: Deployment, observed: Observed
    ) -> list[ApplyRefusedError | ApplyForbiddenError]:
        """Keeps the certificates of the deployment's pods up to date; returns what the API server refused.

        Everything else goes on then: certificates are renewed a month before they expire.

        Raises RetryableError if the API server could not be asked, and there is no certificate yet, unless
        all pods are in plaintext.
        """
        secure, namespace = [pod for pod in observed.pods if pod.secure], deployment.identity.namespace
        if self.certificates is None or not (secure or self._planning.secures_pods(deployment, observed)):
            return []
        unmounted = any(not pod.address and not pod.terminating for pod in secure)
        try:
            self.certificates.ensure(namespace, needed=unmounted)
        except (ApplyRefusedError, ApplyForbiddenError) as error:
            return [error]
        except ReadForbiddenError as error:
            return [ApplyForbiddenError(str(error))]
        except RetryableError as error:
            if self.certificates.identity(namespace) is None and (secure or not observed.pods):
                raise
            logger.warning("%s: the certificates were not checked: %s", deployment.name, error)
        return []

    def _refused(
        self, deployment: Deployment, todo: Plan, refusals: Sequence[ApplyRefusedError | ApplyForbiddenError]
    ) -> float:
        """Reports the API server's refusals; returns when to reconcile again if the plan awaits something
        else.

        Otherwise raises one of the refusals: one that can heal without an edit, if there is any.
        """
        said = "; ".join(dict.fromkeys(map(str, refusals)))
        after = refused(deployment.status, todo.status, said, self.clock())
        self._reporting.blocked(deployment.identity, deployment.status, after)
        if todo.unrouted or todo.recheck:
            logger.warning("%s: %s", deployment.name, said)
            return self.settings.recheck_seconds
        kinds = [type(error) for error in refusals]
        raise next((kind for kind in kinds if issubclass(kind, RetryableError)), kinds[0])(said)

    def _is_brief(self, who: Identity, refusals: Sequence[ApplyRefusedError | ApplyForbiddenError]) -> bool:
        """Whether what is refused heals by itself, as when a webhook restarts, and is not so for too long."""
        name, expected = Name(who.namespace, who.name), [error.brief_seconds for error in refusals]
        if not all(expected) or not expected:
            self._hindered.pop(name, None)
            return False
        now = time.monotonic()
        return now - self._hindered.setdefault(name, now) < min(expected)

    def _report_start(
        self,
        deployment: Deployment,
        todo: Plan,
        refusals: Sequence[ApplyRefusedError | ApplyForbiddenError],
    ) -> None:
        """Right after the CRD is installed nothing exists: that a deployment waits for its pods is true."""
        ready = todo.status.condition(READY)
        young = all(isinstance(one, OwnerUnknownError) for one in refusals)
        if young and ready is not None and ready.status != "True":
            self._reporting.write(deployment.identity, deployment.status, todo.status)

    def _drain(self, deployment: Deployment, addresses: Iterable[str]) -> None:
        """Drains replicas. If the call fails, the deletion of the pod drains the replica."""
        limit = self.settings.rpc_timeout_seconds
        for address, heard in ask(lambda address: drain(address, limit, self.dialer), addresses):
            if not heard:
                logger.info("%s: the worker at %s did not respond to Drain", deployment.name, address)

    def _is_current(self, who: Identity) -> bool:
        """Reads the deployment before creating objects: for a deleted one they would be deleted at once."""
        body = self.cluster.refresh(names.KIND, who.namespace, who.name)
        return body is not None and identity(body) == who


def _with_desired(deployment: Deployment, written: Status) -> Deployment:
    """The deployment with the number of replicas that its status says by now."""
    desired = {"desired_replicas": written.desired_replicas}
    return replace(deployment, status=deployment.status.model_copy(update=desired))


def _describe(span: trace.Span, deployment: Deployment, todo: Plan) -> None:
    span.set_attributes(
        {
            f"{names.GROUP}.generation": deployment.identity.generation,
            f"{names.GROUP}.applied": len(todo.apply),
            f"{names.GROUP}.deleted": len(todo.delete),
        }
    )
