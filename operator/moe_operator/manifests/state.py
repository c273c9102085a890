"""A deployment's state in the few numbers from which its conditions follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from moe_operator.manifests.decision import timestamp
from moe_operator.manifests.observed import (
    Observed,
    Pod,
    frontend_ready,
    frontend_updated,
    frontends,
    leaders,
    owned,
)
from moe_operator.manifests.problems import Problem
from moe_operator.manifests.rollout import Moves, Replica, Terms, moves
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.rollout import Rollout
from moe_operator.resources.status import ModelInfo, RolloutStatus

PLACING_TIME: Final = timedelta(seconds=10)
"""A pod that no node has taken for so long is taken to fit none."""
ENDING_TIME: Final = timedelta(seconds=30)
"""A pod that is there so long after its grace period is taken to be on a node that is gone."""


@dataclass(frozen=True)
class State:
    """What there is of one deployment, against what is wanted."""

    wanted: int
    """Replicas asked for."""
    revision: str
    """Revision asked for."""
    replicas: dict[int, Replica]
    """Replicas that have a StatefulSet of ours, by data rank; surplus ones included."""
    leaders: dict[int, Pod]
    """Leader pods by data rank; those of replicas that are gone already included."""
    progress: RolloutStatus | None
    """How far the rollout under way has come; None where there is none."""
    stalled: bool
    """It has come no further for longer than its deadline allows."""
    rollout: Rollout
    frontend_ready: int
    """Frontend pods that are Ready."""
    frontend_updated: bool
    """All frontend pods are of the template asked for."""
    frontend_problem: Problem | None
    model: ModelInfo | None
    """What a worker said of the model, now or earlier."""
    on_demand: bool = False
    """No replica may be wanted although requests are welcome: the first one brings a replica."""
    conflicts: tuple[str, ...] = ()
    """Wanted objects whose names somebody else's objects have."""
    gated: bool = False
    """spec.quality asks for a checkpoint that is not much worse than its original."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why pods cannot be made, by pod name."""
    lost: frozenset[int] = frozenset()
    """Data ranks of leaders that should have ended, on nodes that do not say so."""

    @property
    def terms(self) -> Terms:
        """What the rollout is asked for."""
        return Terms(self.wanted, self.revision, self.rollout, self.stalled)

    @property
    def moves(self) -> Moves:
        """What the rollout does now."""
        return moves(list(self.replicas.values()), self.terms)

    @property
    def ready(self) -> int:
        """Replicas that answer requests."""
        return sum(replica.ready for replica in self.replicas.values())

    @property
    def updated(self) -> int:
        """Replicas whose leader runs the revision asked for."""
        current = (rank for rank, replica in self.replicas.items() if replica.revision == self.revision)
        return sum(rank in self.leaders for rank in current)

    @property
    def old(self) -> list[Replica]:
        """Replicas of other revisions than the one asked for."""
        return [replica for replica in self.replicas.values() if replica.revision != self.revision]

    @property
    def surplus(self) -> int:
        """Replicas that are there though they are not wanted any more."""
        leaving = self.leaders.keys() - self.replicas.keys() - self.lost
        return len(leaving) + max(len(self.replicas) - self.wanted, 0)

    @property
    def problem(self) -> tuple[Pod, Problem] | None:
        """The first leader that cannot start, and why."""
        pods = [(pod, pod.problem) for pod in self._staying()]
        for name, why in self.refused.items():
            problem = Problem("PodRefused", why)
            missing = Pod(name, "", ready=False, terminating=False, revision="", data_rank=0, problem=problem)
            pods.append((missing, problem))
        return next(((pod, problem) for pod, problem in pods if problem is not None), None)

    @property
    def unready_pods(self) -> list[str]:
        """Names of the leaders that do not answer yet."""
        return [pod.name for pod in self._staying() if not pod.ready]

    def _staying(self) -> list[Pod]:
        return [pod for rank, pod in self.leaders.items() if rank in self.replicas]


def read(
    deployment: Deployment, observed: Observed, revision: str, conflicts: tuple[str, ...], now: datetime
) -> State:
    """Sums up what was observed."""
    pods = leaders(observed)
    problems = (pod.problem for pod in frontends(observed))
    replicas = _replicas(deployment, observed, pods, now)
    progress = _progress(deployment, replicas, revision, now)
    return State(
        wanted=deployment.wanted_replicas,
        revision=revision,
        replicas=replicas,
        leaders=pods,
        progress=progress,
        stalled=progress is not None and _is_late(deployment, progress, replicas, now),
        rollout=deployment.spec.rollout,
        frontend_ready=frontend_ready(observed, deployment.name),
        frontend_updated=frontend_updated(observed, deployment.name),
        frontend_problem=next((problem for problem in problems if problem is not None), None),
        model=observed.model or deployment.status.model,
        on_demand=deployment.scales_to_zero,
        conflicts=conflicts,
        gated=deployment.spec.quality is not None,
        refused=observed.refused,
        lost=frozenset(rank for rank, pod in pods.items() if _is_lost(pod, now)),
    )


def _progress(
    deployment: Deployment, replicas: dict[int, Replica], revision: str, now: datetime
) -> RolloutStatus | None:
    """How far the present rollout has come, from what was written of it last."""
    if all(replica.revision == revision for replica in replicas.values()):
        return None
    ready = sum(replica.ready and replica.revision == revision for replica in replicas.values())
    before = deployment.status.rollout
    same = before is not None and (before.revision, before.ready_replicas) == (revision, ready)
    if before is not None and same and not deployment.spec.rollout.pause:
        return before
    return RolloutStatus(revision=revision, ready_replicas=ready, progressed_at=timestamp(now))


def _is_late(
    deployment: Deployment, progress: RolloutStatus, replicas: dict[int, Replica], now: datetime
) -> bool:
    """Whether replicas of the new revision are awaited for too long."""
    waiting = any(not r.ready for r in replicas.values() if r.revision == progress.revision)
    limit = timedelta(seconds=deployment.spec.rollout.progress_deadline_seconds)
    return waiting and now - datetime.fromisoformat(progress.progressed_at) > limit


def _replicas(
    deployment: Deployment, observed: Observed, pods: dict[int, Pod], now: datetime
) -> dict[int, Replica]:
    found = {}
    for manifest in owned(observed, "StatefulSet", deployment.identity).values():
        labels = manifest["metadata"].get("labels", {})
        rank_text = labels.get(names.LABEL_DATA_RANK, "")
        if not rank_text.isdecimal() or "deletionTimestamp" in manifest["metadata"]:
            continue
        rank, revision = int(rank_text), _template_revision(manifest)
        leader = pods.get(rank)
        ready = leader is not None and leader.ready and leader.revision == revision
        unplaced = leader is not None and _is_unplaced(leader, now)
        work = observed.work.get(leader.name, 0) if leader is not None else 0
        lost = leader is not None and _is_lost(leader, now)
        found[rank] = Replica(rank, revision, ready, unplaced, work, lost)
    return dict(sorted(found.items()))


def _is_lost(pod: Pod, now: datetime) -> bool:
    return pod.ends_by is not None and now - pod.ends_by >= ENDING_TIME


def _is_unplaced(pod: Pod, now: datetime) -> bool:
    return pod.unplaced_since is not None and now - pod.unplaced_since >= PLACING_TIME


def _template_revision(stateful_set: dict[str, dict[str, dict[str, dict[str, dict[str, str]]]]]) -> str:
    return stateful_set["spec"]["template"]["metadata"].get("labels", {}).get(names.LABEL_REVISION, "")
