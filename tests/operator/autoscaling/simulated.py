"""A deployment whose replicas start, serve and report, one round of ten seconds after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from moe_operator.autoscaling import reporting
from moe_operator.autoscaling.model.samples import Report
from moe_operator.autoscaling.readings import Reading
from moe_operator.autoscaling.scaler import Memory, Outcome, Scaler
from moe_operator.autoscaling.subject import Subject, subject
from moe_operator.observed.observation import observe
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.scaling_status import ScalingStatus
from moe_operator.resources.status import Status
from tests.operator.worlds import deployment

START = datetime(2026, 3, 2, tzinfo=UTC)
ROUND_S = 10.0


def pod(name: str, rank: int, uid: str, made: datetime, start_s: float, *, ready: bool) -> dict[str, Any]:
    """A leader as the API server shows it: scheduled after 1 s, its container runs after 2 s."""

    def text(seconds: float) -> str:
        return (made + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")

    conditions = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": text(1)}]
    if ready:
        conditions.append({"type": "Ready", "status": "True", "lastTransitionTime": text(start_s)})
    labels = {
        "name": name,
        "role": "worker",
        "pipeline-rank": "0",
        "expert-rank": "0",
        "data-rank": str(rank),
    }
    return {
        "metadata": {
            "name": f"{name}-{rank}-0",
            "uid": uid,
            "creationTimestamp": text(0),
            "labels": {f"serving.moe-operator.dev/{key}": value for key, value in labels.items()},
        },
        "status": {
            "podIP": f"10.0.0.{rank + 1}",
            "conditions": conditions,
            "containerStatuses": [
                {"name": "worker", "restartCount": 0, "state": {"running": {"startedAt": text(2)}}}
            ],
        },
    }


@dataclass
class Replica:
    uid: str
    made: datetime
    arrived: float = 0.0
    completed: float = 0.0
    late: float = 0.0

    def serve(self, arriving: float, can: float) -> None:
        """One round: it does what it can; what had to wait longer than 2.5 s is late."""
        waiting = self.arrived - self.completed
        self.arrived += arriving
        done = min(self.arrived - self.completed, can)
        self.completed += done
        self.late += done if waiting / can * ROUND_S > 2.5 else 0.0


@dataclass
class Simulation:
    """Plays the cluster to a scaler: orders are carried out, replicas need `start_s` seconds to be Ready."""

    spec: dict[str, Any]
    start_s: float = 120.0
    can: float = 2.0
    """Requests per second that a replica serves."""
    now: datetime = START
    memory: Memory | None = None
    replicas: dict[int, Replica] = field(default_factory=dict)
    spoil: Callable[[Report], Report | None] = lambda report: report
    """Changes a report on its way; None withholds it."""
    held: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    status: ScalingStatus | None = None

    def __post_init__(self) -> None:
        self.deployment: Deployment = deployment(scaling=self.spec)
        self.uids = itertools.count()
        self.order(self.deployment.wanted_replicas)
        self.restart()

    def restart(self) -> None:
        """The operator's process is another one, which knows what was kept."""
        prior = self.subject().spec.capacity_prior
        self.scaler = Scaler(self.deployment.wanted_replicas, self.memory, prior)

    def order(self, count: int) -> None:
        for rank in range(count):
            self.replicas.setdefault(rank, Replica(f"uid-{next(self.uids)}", self.now))
        self.replicas = {rank: one for rank, one in self.replicas.items() if rank < count}

    def is_ready(self, replica: Replica) -> bool:
        return (self.now - replica.made).total_seconds() >= self.start_s

    def subject(self) -> Subject:
        pods = [
            pod("docs", rank, one.uid, one.made, self.start_s, ready=self.is_ready(one))
            for rank, one in self.replicas.items()
        ]
        found = subject(self.deployment, observe(pods_there=pods))
        assert found is not None
        return found

    def round(self, per_second: float) -> Outcome:
        """Ten seconds of requests, spread evenly; then everybody reports, and the scaler decides."""
        self.now += timedelta(seconds=ROUND_S)
        ready = [rank for rank, one in self.replicas.items() if self.is_ready(one)]
        for rank in ready:
            self.replicas[rank].serve(per_second * ROUND_S / len(ready), self.can * ROUND_S)
        told = {rank: self.spoil(self.report(rank)) for rank in self.replicas}
        reading = Reading(
            reports=tuple(report for report in told.values() if report is not None),
            silent=frozenset(f"docs-{rank}-0" for rank, report in told.items() if report is None),
            held=self.held,
        )
        at = self.subject()
        outcome = self.scaler.step(at, reading, self.now.timestamp())
        job = self.scaler.upkeep()
        if job is not None:
            job()()
        self.outcomes.append(outcome)
        self.told = reporting.verdict(at, outcome), reporting.announcement(at, outcome, self.status)
        self.status = reporting.status(at, outcome, self.status, self.now)
        self.deployment = replace(self.deployment, status=Status(scaling=self.status))
        self.order(self.deployment.wanted_replicas)
        return outcome

    def report(self, rank: int) -> Report:
        replica = self.replicas[rank]
        return Report(
            replica=f"docs-{rank}-0",
            at=self.now.timestamp(),
            started=replica.made.timestamp() + 5,
            arrived=replica.arrived,
            completed=replica.completed,
            waiting=max(replica.arrived - replica.completed - self.can, 0.0),
            late=replica.late,
        )

    def run(self, rates: Iterable[float]) -> list[int]:
        """Rounds with these rates, in requests per second; gives the replicas ordered after each."""
        return [self.round(rate) and len(self.replicas) for rate in rates]


def minutes(count: float, per_second: float) -> list[float]:
    """Rounds of a constant rate."""
    return [per_second] * round(count * 60 / ROUND_S)
