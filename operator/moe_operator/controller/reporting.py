"""Reports a reconcile: status, metrics, spans, log lines and Events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from opentelemetry import trace

from moe_operator.controller.deployment_metrics import DeploymentMetrics
from moe_operator.controller.work_metrics import WorkMetrics
from moe_operator.errors import ClusterUnavailableError, MoEOperatorError
from moe_operator.executor import execute
from moe_operator.kube.client import Cluster
from moe_operator.planner.decision import Decision
from moe_operator.planner.status_report import transitions
from moe_operator.resources.deployment import Identity, Name
from moe_operator.resources.status import Status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reporting:
    """Reports what reconciles find and decide. Blocking; may run in several threads at once."""

    cluster: Cluster
    clock: Callable[[], datetime]
    metrics: WorkMetrics
    states: DeploymentMetrics

    def blocked(self, who: Identity, before: Status, after: Status) -> None:
        """Reports what blocks a deployment."""
        self.write(who, before, after)
        self.announce(who, transitions(before, after))

    def write(self, who: Identity, before: Status, after: Status) -> None:
        """Writes the status to the API server and to the metrics."""
        self.states.record(Name(who.namespace, who.name), after)
        execute.write_status(self.cluster, who, before, after)

    def announce(self, who: Identity, decisions: Iterable[Decision]) -> None:
        """Makes an Event, a log line and a span event of each decision.

        No more Events after one that the API server did not answer: each may take the limit of a request.
        """
        span, answers = trace.get_current_span(), True
        for decision in decisions:
            self.metrics.decided(decision.reason)
            span.add_event(decision.reason, {"reason": decision.reason, "message": decision.message})
            logger.info("%s/%s: %s: %s", who.namespace, who.name, decision.reason, decision.message)
            if not answers:
                continue
            try:
                execute.post(self.cluster, who, decision, self.clock())
            except MoEOperatorError as error:
                # Events are only for people; the decision is executed even without one.
                answers = not isinstance(error, ClusterUnavailableError)
                logger.warning("%s/%s: no event was created: %s", who.namespace, who.name, error)
