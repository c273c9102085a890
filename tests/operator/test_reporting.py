"""Decisions are told in the log and as Events; an API server that does not answer delays nothing for long."""

import logging
from datetime import UTC, datetime

import pytest
from opentelemetry.metrics import get_meter

from moe_operator.controller.deployment_metrics import DeploymentMetrics
from moe_operator.controller.reporting import Reporting
from moe_operator.controller.work_metrics import WorkMetrics
from moe_operator.errors import ApplyForbiddenError, ClusterUnavailableError
from moe_operator.planner.decision import Decision
from moe_operator.resources.deployment import Identity

DECISIONS = [Decision("ReplicaRemoved", f"deleted StatefulSet docs-{rank}") for rank in range(3)]


@pytest.mark.parametrize(
    ("error", "tries"), [(ClusterUnavailableError("away"), 1), (ApplyForbiddenError("quota"), 3), (None, 3)]
)
def test_every_decision_is_logged_but_events_end_with_the_first_that_is_not_answered(error, tries, caplog):
    posted = []

    class Cluster:
        def create(self, manifest):
            posted.append(manifest["message"])
            if error is not None:
                raise error

    meter = get_meter("test")
    reporting = Reporting(Cluster(), lambda: datetime.now(UTC), WorkMetrics(meter), DeploymentMetrics(meter))
    caplog.set_level(logging.INFO)
    reporting.announce(Identity("default", "docs", "uid", 1), DECISIONS)
    assert posted == [decision.message for decision in DECISIONS[:tries]]
    assert sum("ReplicaRemoved: deleted" in line for line in caplog.messages) == 3
