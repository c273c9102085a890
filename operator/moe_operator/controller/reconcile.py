"""One reconcile: gather, plan, apply, report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

from opentelemetry import trace
from opentelemetry.metrics import get_meter

from moe_operator.controller.deployment_metrics import DeploymentMetrics
from moe_operator.controller.gather import gather, unlabelled, with_refusal
from moe_operator.controller.room import room
from moe_operator.controller.work_metrics import WorkMetrics
from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    InvalidSpecError,
    MoEOperatorError,
    PermanentError,
    ReadForbiddenError,
    RetryableError,
)
from moe_operator.executor import execute
from moe_operator.executor.certificates import Certificates
from moe_operator.kube import peering
from moe_operator.kube.client import Cluster
from moe_operator.observed.downloads import Download
from moe_operator.observed.observation import Observed
from moe_operator.observed.pods import Pod
from moe_operator.planner import host_paths
from moe_operator.planner.decision import Decision
from moe_operator.planner.pinning import with_pins
from moe_operator.planner.plan import Plan, model_address, plan
from moe_operator.planner.status_report import invalid, refused, transitions
from moe_operator.render.worker import recipe, revision
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Identity, Name, identity, parse, parse_status
from moe_operator.resources.status import Status
from moe_operator.rpc.dialing import PLAINTEXT, Dialer
from moe_operator.rpc.frontends import routed
from moe_operator.rpc.leader import download, drain, get_model
from moe_operator.rpc.mesh import MeshReader
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


@dataclass(frozen=True)
class Reconciler:
    """Brings deployments closer to their specs. Blocking; may run in several threads at once."""

    cluster: Cluster
    settings: Settings
    rank: peering.Rank
    """The peering of this process."""
    clock: Callable[[], datetime]
    active: Callable[[Collection[str]], Mapping[str, int]]
    """Returns the active requests of workers by IP address, without workers that do not respond."""
    tracer: trace.Tracer = field(default_factory=lambda: trace.get_tracer(__name__))
    watcher: Watcher | None = None
    """Receives the observations of every reconcile: scaling."""
    metrics: WorkMetrics = field(default_factory=lambda: WorkMetrics(get_meter(__name__)))
    states: DeploymentMetrics = field(default_factory=lambda: DeploymentMetrics(get_meter(__name__)))
    certificates: Certificates | None = None
    """Issues certificates for mutual TLS; None in tests without it."""
    dialer: Dialer = PLAINTEXT
    _meshes: MeshReader = field(default_factory=MeshReader)
    _thought: threading.Lock = field(default_factory=threading.Lock)
    """Only one thread at a time reads the cache and plans. The interpreter runs one thread at a time anyway;
    threads that compete for its lock, as every decompression does, take four times as long.
    """

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
                if self.watcher is not None:
                    self.watcher.gone(name)
                return None
            try:
                deployment = replace(parse(body), operator_namespace=self.settings.namespace)
                return self._advance(deployment, span)
            except InvalidSpecError as error:
                before = parse_status(body)
                self._report(
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
        deployment, observed, todo = self._planned(deployment, observed)
        while others := unlabelled(self.cluster, deployment.identity.namespace, todo.apply):
            observed = replace(observed, children={**observed.children, **others})
            deployment, observed, todo = self._planned(deployment, observed)
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
        end = time.monotonic() + self.settings.reconcile_seconds
        refusals = execute.execute(self.cluster, deployment.identity, todo, lambda: time.monotonic() < end)
        if refusals := [*uncertified, *refusals]:
            return self._refused(deployment, todo, refusals)
        self._write(deployment.identity, deployment.status, todo.status)
        self._announce(deployment.identity, todo.decisions)
        self._record(_with_desired(deployment, todo.status))
        opened = {gate.pod for gate in todo.gates}
        if any(pod.name not in opened for pod in todo.unrouted):
            return self.settings.routing_seconds
        return self._until_next(todo)

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
            with self._thought:
                observed = gather(self.cluster, deployment)
            return with_refusal(self.cluster, deployment, observed)
        except ReadForbiddenError as error:
            who, before = deployment.identity, deployment.status
            known = before.without_scaling().model_copy(update={"observed_generation": who.generation})
            self._report(who, before, refused(before, known, str(error), self.clock(), "ReadForbidden"))
            raise

    def _certify(
        self, deployment: Deployment, observed: Observed
    ) -> list[ApplyRefusedError | ApplyForbiddenError]:
        """Keeps the certificates of the deployment's pods up to date; returns what the API server refused.

        Everything else goes on then: certificates are renewed a month before they expire.
        """
        mutual = deployment.spec.transport.mutual or any(pod.secure for pod in observed.pods)
        if self.certificates is None or not mutual:
            return []
        try:
            self.certificates.ensure(deployment.identity.namespace)
        except (ApplyRefusedError, ApplyForbiddenError) as error:
            return [error]
        except ReadForbiddenError as error:
            return [ApplyForbiddenError(str(error))]
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
        self._report(deployment.identity, deployment.status, after)
        self._announce(deployment.identity, todo.removals)
        if todo.unrouted or todo.recheck:
            logger.warning("%s: %s", deployment.name, said)
            return self.settings.recheck_seconds
        kinds = [type(error) for error in refusals]
        raise next((kind for kind in kinds if issubclass(kind, RetryableError)), kinds[0])(said)

    def _planned(self, deployment: Deployment, observed: Observed) -> tuple[Deployment, Observed, Plan]:
        """The plan and its inputs: pinned pods, and the responses of workers and frontends."""
        with self._thought:
            deployment = with_pins(deployment, observed)
        observed = self._with_meshes(self._with_model(deployment, observed))
        todo = self._plan(deployment, observed)
        if todo.question is not None:
            found = room(self.cluster, deployment.identity.namespace, todo.question)
            observed = replace(observed, obstacles=found.obstacles, together=found.together)
            todo = self._plan(deployment, observed)
        if todo.choice or todo.unrouted or todo.fetching:
            observed = self._asked(observed, todo)
            todo = self._plan(deployment, observed)
        return deployment, observed, todo

    def _plan(self, deployment: Deployment, observed: Observed) -> Plan:
        with self._thought:
            return plan(deployment, observed, self.clock())

    def _asked(self, observed: Observed, todo: Plan) -> Observed:
        """The observation, extended by what the plan needs from workers and frontends."""
        limit = self.settings.rpc_timeout_seconds
        work = self._work(todo.choice) if todo.choice else {}
        return replace(
            observed,
            work=work,
            routed=routed(observed.frontends, todo.unrouted, limit, observed.routes, self.dialer)
            if todo.unrouted
            else {},
            downloads=self._downloads(todo.fetching),
        )

    def _downloads(self, pods: Iterable[Pod]) -> dict[str, Download]:
        """How far the downloads of the model are, of pods that say it."""
        limit = self.settings.rpc_timeout_seconds
        found = ask(lambda pod: download(pod.address, limit), pods)
        return {pod.name: told for pod, told in found if told is not None}

    def _work(self, pods: Iterable[Pod]) -> dict[str, int]:
        """Active requests on each; one that does not respond counts as idle, because it probably hangs."""
        addresses = {pod.name: pod.grpc_address for pod in pods}
        active = self.active(tuple(addresses.values()))
        return {name: active.get(address, 0) for name, address in addresses.items()}

    def _drain(self, deployment: Deployment, addresses: Iterable[str]) -> None:
        """Drains replicas. If the call fails, the deletion of the pod drains the replica."""
        limit = self.settings.rpc_timeout_seconds
        for address, heard in ask(lambda address: drain(address, limit, self.dialer), addresses):
            if not heard:
                logger.info("%s: the worker at %s did not respond to Drain", deployment.name, address)

    def _with_model(self, deployment: Deployment, observed: Observed) -> Observed:
        address = model_address(deployment, observed)
        if address is None:
            return observed
        try:
            limit = self.settings.rpc_timeout_seconds
            model = get_model(address, revision(deployment), limit, self.dialer)
        except RetryableError as error:
            # The plan requests another reconcile soon; meanwhile nothing else has to wait for a busy worker.
            logger.info("%s: %s", deployment.name, error)
            return observed
        return replace(observed, model=model)

    def _with_meshes(self, observed: Observed) -> Observed:
        """Adds what the ready leaders of gangs report of their ranks."""
        gangs = [pod for pod in observed.leaders.values() if pod.shape and pod.ready and pod.address]
        if not gangs:
            return observed
        limit = self.settings.rpc_timeout_seconds
        return replace(observed, meshes=self._meshes.read(gangs, limit, self.dialer))

    def _is_current(self, who: Identity) -> bool:
        """Reads the deployment before creating objects: for a deleted one they would be deleted at once."""
        body = self.cluster.refresh(names.KIND, who.namespace, who.name)
        return body is not None and identity(body) == who

    def _report(self, who: Identity, before: Status, after: Status) -> None:
        """Reports what blocks a deployment."""
        self._write(who, before, after)
        self._announce(who, transitions(before, after))

    def _write(self, who: Identity, before: Status, after: Status) -> None:
        """Writes the status to the API server and to the metrics."""
        self.states.record(Name(who.namespace, who.name), after)
        execute.write_status(self.cluster, who, before, after)

    def _announce(self, who: Identity, decisions: Iterable[Decision]) -> None:
        span = trace.get_current_span()
        for decision in decisions:
            self.metrics.decided(decision.reason)
            span.add_event(decision.reason, {"reason": decision.reason, "message": decision.message})
            logger.info("%s/%s: %s: %s", who.namespace, who.name, decision.reason, decision.message)
            try:
                execute.post(self.cluster, who, decision, self.clock())
            except MoEOperatorError as error:
                # Events are only for people; the decision is executed even without one.
                logger.warning("%s/%s: no event was created: %s", who.namespace, who.name, error)


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
