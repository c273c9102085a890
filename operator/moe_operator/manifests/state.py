"""A deployment's state in the few numbers from which its conditions follow."""

from __future__ import annotations

from dataclasses import dataclass

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
from moe_operator.manifests.rollout import Replica
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.status import ModelInfo


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
    """Leader pods by data rank; surplus ones included."""
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

    @property
    def ready(self) -> int:
        """Wanted replicas that answer requests."""
        return sum(replica.ready for rank, replica in self.replicas.items() if rank < self.wanted)

    @property
    def updated(self) -> int:
        """Wanted replicas whose leader runs the revision asked for."""
        return sum(pod.revision == self.revision for rank, pod in self.leaders.items() if rank < self.wanted)

    @property
    def surplus(self) -> int:
        """Replicas that are there though they are not wanted any more."""
        return len({rank for rank in (*self.replicas, *self.leaders) if rank >= self.wanted})

    @property
    def problem(self) -> tuple[Pod, Problem] | None:
        """The first leader that cannot start, and why."""
        wanted = (pod for rank, pod in self.leaders.items() if rank < self.wanted)
        return next(((pod, pod.problem) for pod in wanted if pod.problem is not None), None)

    @property
    def unready_pods(self) -> list[str]:
        """Names of the wanted leaders that do not answer yet."""
        return [pod.name for rank, pod in self.leaders.items() if rank < self.wanted and not pod.ready]


def read(deployment: Deployment, observed: Observed, revision: str, conflicts: tuple[str, ...]) -> State:
    """Sums up what was observed."""
    pods = leaders(observed)
    problems = (pod.problem for pod in frontends(observed))
    return State(
        wanted=deployment.wanted_replicas,
        revision=revision,
        replicas=_replicas(deployment, observed, pods),
        leaders=pods,
        frontend_ready=frontend_ready(observed, deployment.name),
        frontend_updated=frontend_updated(observed, deployment.name),
        frontend_problem=next((problem for problem in problems if problem is not None), None),
        model=observed.model or deployment.status.model,
        on_demand=deployment.scales_to_zero,
        conflicts=conflicts,
    )


def _replicas(deployment: Deployment, observed: Observed, pods: dict[int, Pod]) -> dict[int, Replica]:
    found = {}
    for manifest in owned(observed, "StatefulSet", deployment.identity).values():
        labels = manifest["metadata"].get("labels", {})
        rank_text = labels.get(names.LABEL_DATA_RANK, "")
        if not rank_text.isdecimal() or "deletionTimestamp" in manifest["metadata"]:
            continue
        rank, revision = int(rank_text), _template_revision(manifest)
        leader = pods.get(rank)
        ready = leader is not None and leader.ready and leader.revision == revision
        found[rank] = Replica(rank, revision, ready)
    return dict(sorted(found.items()))


def _template_revision(stateful_set: dict[str, dict[str, dict[str, dict[str, dict[str, str]]]]]) -> str:
    return stateful_set["spec"]["template"]["metadata"].get("labels", {}).get(names.LABEL_REVISION, "")
