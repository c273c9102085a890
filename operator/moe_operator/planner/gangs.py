"""Replicas of several workers: all or nothing.

A gang of which some pods have nodes and others have none holds GPUs and serves nothing. After a deadline its
pods are deleted, and created again after a pause that doubles with each attempt. A gang whose workers keep
restarting is stopped when its budget is spent. Readiness, rollouts and everything else see one replica: its
leader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from moe_operator.observed.children import StatefulSet
from moe_operator.observed.observation import Observed
from moe_operator.observed.pods import Pod
from moe_operator.observed.problems import Problem, scheduler_says
from moe_operator.planner.decision import Decision, timestamp
from moe_operator.render import gang as render
from moe_operator.render.gang_record import NOTHING, GangRecord
from moe_operator.render.objects import Manifest
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.parallelism_spec import Parallelism

FIRST_PAUSE: Final = timedelta(seconds=15)
LONGEST_PAUSE: Final = timedelta(minutes=10)
REPORT_PERIOD: Final = timedelta(seconds=60)
"""How often leaders are asked for the load of their ranks, if no event causes a reconcile."""
HEALTHY_TIME: Final = timedelta(minutes=10)
"""A gang that has been ready for so long has a new restart budget."""
_SPREAD: Final = 8
"""Gangs that were deleted together are created again at different times, so that one of them finds room."""


@dataclass(frozen=True)
class Gang:
    """One replica of several workers."""

    name: str
    """Of its StatefulSet."""
    data_rank: int
    size: int
    """Workers that it has when it is whole."""
    pods: tuple[Pod, ...]
    """Those that are not terminating, by rank."""
    record: GangRecord
    """As observed."""
    next: GangRecord = NOTHING
    """As it has to be now."""

    @property
    def leader(self) -> Pod | None:
        """Rank 0."""
        return next((pod for pod in self.pods if pod.rank == 0), None)

    @property
    def ready(self) -> int:
        """Workers that are ready."""
        return sum(pod.ready for pod in self.pods)

    @property
    def unplaced(self) -> list[Pod]:
        """Workers that no node takes."""
        return [pod for pod in self.pods if pod.unplaced_since is not None]

    @property
    def is_whole(self) -> bool:
        """Whether every worker has a node."""
        return len(self.pods) == self.size and all(pod.node for pod in self.pods)

    @property
    def restarts(self) -> int:
        """Of the worker with the most."""
        return max((pod.restarts for pod in self.pods), default=0)

    @property
    def problem(self) -> tuple[Pod, Problem] | None:
        """The first cause of its workers' problems: one that another rank's end did not cause, the
        earliest.
        """
        found = [(pod, pod.problem) for pod in self.pods if pod.problem is not None]
        return min(found, key=lambda pair: (pair[1].follows, pair[1].since), default=None)


def read(deployment: Deployment, observed: Observed, now: datetime) -> dict[int, Gang]:
    """The gangs of a deployment, by data rank."""
    found = {}
    for name, one in observed.owned(StatefulSet, deployment.identity).items():
        if one.size > 1 and one.data_rank is not None and not one.terminating:
            pods = tuple(pod for pod in observed.workers.get(one.data_rank, ()) if not pod.terminating)
            gang = Gang(name, one.data_rank, one.size, pods, one.record)
            found[one.data_rank] = replace(gang, next=advance(gang, deployment.spec.parallelism, now))
    return found


def advance(gang: Gang, terms: Parallelism, now: datetime) -> GangRecord:
    """The record of a gang from now on."""
    record, leader = gang.record, gang.leader
    if record.held(now):
        return record
    if leader is not None and leader.ready:
        since = leader.ready_since
        healthy = since is not None and now - since >= HEALTHY_TIME
        return GangRecord(restarts=gang.restarts if healthy else min(record.restarts, gang.restarts))
    if gang.restarts - min(record.restarts, gang.restarts) > terms.restart_budget:
        return _stopped(gang)
    if gang.is_whole:
        return GangRecord(restarts=record.restarts)
    since = _lacks_since(gang)
    if since is not None and now - since >= timedelta(seconds=terms.scheduling_deadline_seconds):
        return _released(gang, terms, now)
    return record


def _lacks_since(gang: Gang) -> datetime | None:
    """Since when some pods have nodes and others have none; None if that is not so."""
    waiting = [pod.unplaced_since for pod in gang.unplaced if pod.unplaced_since is not None]
    return min(waiting) if waiting and any(pod.node for pod in gang.pods) else None


def _released(gang: Gang, terms: Parallelism, now: datetime) -> GangRecord:
    pod = gang.unplaced[0]
    attempts, said = gang.record.attempts + 1, pod.problem.said if pod.problem else ""
    placed, limit = sum(bool(one.node) for one in gang.pods), terms.scheduling_deadline_seconds
    why = f"{pod.title} found no node within {limit} s, and {placed} of {gang.size} workers had one"
    until = timestamp(now + pause(attempts, gang.data_rank))
    return GangRecord(attempts, until, why=f"{why}{scheduler_says(said)}", said=said)


def pause(attempts: int, data_rank: int) -> timedelta:
    """How long a gang stays without pods: twice as long each time, and different for different gangs."""
    base = min(FIRST_PAUSE * (1 << min(attempts - 1, 10)), LONGEST_PAUSE)
    return base * (1 + data_rank % _SPREAD / _SPREAD)


def _stopped(gang: Gang) -> GangRecord:
    restarts = gang.restarts - min(gang.record.restarts, gang.restarts)
    cause = gang.problem
    said = f"{cause[0].title}: {cause[1].message}" if cause else "its workers give no reason"
    why = f"it did not become ready within {restarts} restarts; {said}"
    return GangRecord(stopped=True, why=why)


def problem(gang: Gang, now: datetime) -> Problem | None:
    """Why a gang has no pods on purpose; None if it has some."""
    record = gang.next
    if record.stopped:
        remedy = "remove the cause and run `moe rollout restart`, or edit the spec"
        return Problem("RestartBudgetExhausted", f"{record.why}; {remedy}", stuck=True, remedied=True)
    if record.held(now):
        again = f"its pods are deleted, so that they hold no resources, and created again at {record.until}"
        remedy = "free resources or add nodes"
        message = f"{record.why}; {again} (attempt {record.attempts + 1}); {remedy}"
        return Problem("GangUnschedulable", message, said=record.said, remedied=True)
    return None


def decisions(gangs: Iterable[Gang], now: datetime) -> list[Decision]:
    """A decision for each gang whose pods are deleted, or created again."""
    told = []
    for gang in gangs:
        before, after = gang.record, gang.next
        why = problem(gang, now)
        if after != before and why is not None:
            told.append(Decision(why.reason, f"{gang.name}: {why.message}", warning=True))
    return told


def next_change(gangs: Iterable[Gang], terms: Parallelism, now: datetime) -> datetime | None:
    """When a gang is due without an event: the end of its pause, its deadline, or the next report of its
    leader's; None if none is.
    """
    limit = timedelta(seconds=terms.scheduling_deadline_seconds)
    due = []
    for gang in gangs:
        since = _lacks_since(gang)
        if gang.next.until:
            due.append(datetime.fromisoformat(gang.next.until))
        elif since is not None:
            due.append(since + limit)
        elif gang.leader is not None and gang.leader.ready:
            due.append(now + REPORT_PERIOD)
    return min(due, default=None)


def held_pod(gang: Gang, now: datetime) -> Pod | None:
    """Stands for the leader of a gang without pods, with the reason as its problem."""
    why = problem(gang, now)
    if why is None:
        return None
    return Pod(
        gang.name, "", ready=False, terminating=False, revision="", data_rank=gang.data_rank, problem=why
    )


def secret_is_needed(gangs: Iterable[Gang], created: Iterable[Manifest]) -> bool:
    """Whether the deployment's Secret has to exist now: a gang is created, or is not ready."""
    new = any(
        manifest["kind"] == "StatefulSet" and render.size(manifest["spec"]["template"]) > 1
        for manifest in created
    )
    return new or any(gang.ready < gang.size and not gang.next.stopped for gang in gangs)
