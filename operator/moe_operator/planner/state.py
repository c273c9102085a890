"""A deployment's state: the numbers that determine its conditions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from moe_operator.observed.children import StatefulSet
from moe_operator.observed.downloads import Download
from moe_operator.observed.observation import Observed
from moe_operator.observed.pods import Pod
from moe_operator.observed.problems import FAILED_TIME, WAITING_TIME, Problem, refused_pod
from moe_operator.planner import gangs, mesh, rollout_progress
from moe_operator.planner.frontend_state import FrontendState, frontend_state
from moe_operator.planner.gangs import Gang
from moe_operator.planner.moves import Moves, Replica, Terms, moves
from moe_operator.render.gang import shape
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.deprecated import advice
from moe_operator.resources.rollout_spec import Rollout
from moe_operator.resources.status import MeshStatus, ModelInfo, RolloutStatus

PLACING_TIME: Final = timedelta(seconds=10)
"""A pod that stays pending for this long counts as fitting no node."""
FALTERING_TIME: Final = timedelta(seconds=60)
"""A replica that is not ready for longer counts as not recovering by itself."""
ENDING_TIME: Final = timedelta(seconds=30)
"""A pod that still exists this long after its grace period counts as being on a lost node."""


@dataclass(frozen=True)
class State:
    """The observed state of one deployment, compared with the desired one."""

    wanted: int
    """Desired number of replicas."""
    revision: str
    """Desired revision."""
    replicas: Mapping[int, Replica]
    """Replicas that have a StatefulSet of ours, by data rank; surplus ones included."""
    leaders: Mapping[int, Pod]
    """Leader pods by data rank, including those of deleted replicas."""
    progress: RolloutStatus | None
    """Progress of the current rollout; None if there is none."""
    deadline: datetime | None
    """When that rollout counts as stuck unless it progresses; None if there is none."""
    stalled: bool
    """The deadline has passed."""
    rollout: Rollout
    frontend: FrontendState
    model: ModelInfo | None
    """The model as reported by a worker, now or earlier."""
    on_demand: bool = False
    """The deployment scales to zero: without a replica, the first request creates one."""
    conflicts: tuple[str, ...] = ()
    """Desired objects whose names belong to objects of other owners."""
    gated: bool = False
    """spec.quality asks for a checkpoint that is not much worse than its original."""
    deprecated: tuple[str, ...] = ()
    """What to write instead of each deprecated field that the spec sets."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why pods cannot be created, by pod name."""
    obstacles: Mapping[str, str] = field(default_factory=dict)
    """Why a new replica's pod would not fit in the place of an old leader, by pod name."""
    downloads: Mapping[str, Download] = field(default_factory=dict)
    """How far downloads of the model are, by pod name."""
    lost: frozenset[int] = frozenset()
    """Data ranks of replicas with a pod that should have ended, on a node that does not report it."""
    pods: Mapping[int, tuple[Pod, ...]] = field(default_factory=dict)
    """All workers by data rank, in order of their ranks; including those of deleted replicas."""
    gangs: Mapping[int, Gang] = field(default_factory=dict)
    """Replicas of several workers, by data rank."""
    held: Mapping[int, Pod] = field(default_factory=dict)
    """Stands for those of them that have no pods on purpose, with the reason."""
    mesh: MeshStatus | None = None
    """What the status says of the gangs; None if there are none."""
    imbalance_most: int | None = None
    """The imbalance in percent above which experts are not balanced; None if they are not spread."""
    delayed: Mapping[str, Problem] = field(default_factory=dict)
    """What workers have waited for too long, by pod name."""
    delays_due: datetime | None = None
    """When a worker or frontend has next waited for too long, or why the one before it failed is past."""

    @property
    def terms(self) -> Terms:
        """The desired state of the rollout."""
        return Terms(self.wanted, self.revision, self.rollout, self.stalled)

    @property
    def moves(self) -> Moves:
        """The current moves of the rollout."""
        return moves(list(self.replicas.values()), self.terms)

    @property
    def ready(self) -> int:
        """Ready replicas."""
        return sum(replica.ready for replica in self.replicas.values())

    @property
    def updated(self) -> int:
        """Ready replicas of the desired revision."""
        return rollout_progress.ready_at(self.revision, self.replicas)

    @property
    def old(self) -> list[Replica]:
        """Replicas of other revisions than the desired one."""
        return [replica for replica in self.replicas.values() if replica.revision != self.revision]

    @property
    def surplus(self) -> int:
        """Surplus replicas."""
        leaving = self.pods.keys() - self.replicas.keys() - self.lost
        return len(leaving) + max(len(self.replicas) - self.wanted, 0)

    @property
    def problem(self) -> tuple[Pod, Problem] | None:
        """The first worker that cannot start, and why; those of the desired revision come first."""
        ranks = sorted(self.replicas, key=self._is_old)
        pods = [pair for rank in ranks if (pair := self._problem_of(rank)) is not None]
        for name, why in self.refused.items():
            problem = refused_pod(why)
            missing = Pod(name, "", ready=False, terminating=False, revision="", data_rank=0, problem=problem)
            pods.append((missing, problem))
        return pods[0] if pods else None

    @property
    def loaded(self) -> bool:
        """Whether a worker has loaded the model, whether or not requests reach it."""
        return self.ready > 0 or any(pod.containers_ready for pod in self._staying())

    @property
    def unready_pods(self) -> list[Pod]:
        """The leaders that are not ready yet."""
        return [pod for pod in self._staying() if not pod.ready]

    @property
    def fetching(self) -> list[Pod]:
        """The leaders that download the model now."""
        return [pod for pod in self._staying() if pod.fetching and pod.address]

    @property
    def download(self) -> tuple[Pod, str] | None:
        """The first leader that downloads the model, and how far it is."""
        return next(
            ((pod, self.downloads[pod.name].text) for pod in self.fetching if pod.name in self.downloads),
            None,
        )

    def _problem_of(self, rank: int) -> tuple[Pod, Problem] | None:
        """Why a replica does not start: its pods are deleted on purpose, or one of them has a problem."""
        held = self.held.get(rank)
        if held is not None and held.problem is not None:
            return held, held.problem
        gang, leader = self.gangs.get(rank), self.leaders.get(rank)
        if leader is not None and leader.ready:
            return None
        if gang is not None and gang.problem is not None:
            return gang.problem
        for pod in filter(None, (leader,)) if gang is None else gang.pods:
            if (why := pod.problem or self.delayed.get(pod.name)) is not None:
                return pod, why
        return None

    def unplaced_pod(self, rank: int) -> Pod:
        """A worker of a replica that no node takes."""
        if rank in self.held:
            return self.held[rank]
        pods = self.pods.get(rank, ())
        return next((pod for pod in pods if pod.unplaced_since is not None), self.leaders[rank])

    def described(self, pod: Pod) -> str:
        """A leader's name, and how many workers of its replica are ready."""
        gang = self.gangs.get(pod.data_rank)
        return pod.name if gang is None else f"{pod.name} ({gang.ready}/{gang.size} workers ready)"

    def _is_old(self, rank: int) -> bool:
        return self.replicas[rank].revision != self.revision

    def _staying(self) -> list[Pod]:
        return [pod for rank, pod in self.leaders.items() if rank in self.replicas]


def read(
    deployment: Deployment, observed: Observed, revision: str, conflicts: tuple[str, ...], now: datetime
) -> State:
    """Sums up what was observed."""
    everyone = observed.workers
    found = gangs.read(deployment, observed, now)
    replicas = _replicas(deployment, observed, found, now)
    frontend = frontend_state(observed, deployment.name, deployment.spec.frontend.replicas, now)
    workers = [pod for own in everyone.values() for pod in own]
    progress = rollout_progress.progress(deployment, replicas, frontend, revision, now)
    deadline = None if progress is None else rollout_progress.deadline(deployment, progress)
    return State(
        wanted=deployment.wanted_replicas,
        revision=revision,
        replicas=replicas,
        leaders=observed.leaders,
        progress=progress,
        deadline=deadline,
        stalled=deadline is not None and now > deadline,
        rollout=deployment.spec.rollout,
        frontend=frontend,
        model=observed.model or deployment.status.model,
        on_demand=deployment.scales_to_zero,
        conflicts=conflicts,
        gated=deployment.spec.quality is not None,
        deprecated=tuple(advice(deployment.spec)),
        refused=observed.refused,
        obstacles=observed.obstacles,
        downloads=observed.downloads,
        lost=frozenset(rank for rank, own in everyone.items() if any(_is_lost(pod, now) for pod in own)),
        pods=everyone,
        gangs=found,
        held={rank: pod for rank, gang in found.items() if (pod := gangs.held_pod(gang, now)) is not None},
        mesh=mesh.status(found, observed.meshes, shape(deployment.spec.parallelism)),
        imbalance_most=_imbalance_most(deployment),
        delayed={pod.name: why for pod in workers if not pod.problem and (why := pod.obstacle(now))},
        delays_due=_delays_due((*workers, *observed.frontends), now),
    )


def _delays_due(pods: Iterable[Pod], now: datetime) -> datetime | None:
    moments = (moment for pod in pods if not pod.terminating for moment in _moments(pod))
    return min((moment for moment in moments if moment > now), default=None)


def _moments(pod: Pod) -> Iterator[datetime]:
    """When what explains that a pod is not ready changes by itself."""
    status, before = pod.status, pod.status if pod.status.ended else pod.before
    for since in (status.queued_since, status.mounting_since):
        if since is not None:
            yield since + WAITING_TIME
    if before is not None and before.ended_since is not None:
        yield before.ended_since + FAILED_TIME


def _imbalance_most(deployment: Deployment) -> int | None:
    parallelism = deployment.spec.parallelism
    if parallelism.expert == 1:
        return None
    return mesh.threshold(parallelism.rebalance.threshold_percentage if parallelism.rebalance else None)


def _replicas(
    deployment: Deployment, observed: Observed, found_gangs: Mapping[int, Gang], now: datetime
) -> dict[int, Replica]:
    found = {}
    for one in observed.owned(StatefulSet, deployment.identity).values():
        rank = one.data_rank
        if rank is None or one.terminating:
            continue
        waits = rank in found_gangs and bool(found_gangs[rank].next.attempts)
        found[rank] = (
            Replica(rank, one.revision, ready=False, unplaced=waits)
            if rank not in observed.leaders
            else _replica(rank, one.revision, observed, now)
        )
    return dict(sorted(found.items()))


def _replica(rank: int, revision: str, observed: Observed, now: datetime) -> Replica:
    leader, own = observed.leaders[rank], observed.workers[rank]
    others = observed.together.get(leader.name, frozenset())
    return Replica(
        rank,
        revision,
        ready=leader.ready and leader.revision == revision,
        unplaced=any(_is_unplaced(pod, now) for pod in own),
        work=observed.work.get(leader.name, 0),
        lost=any(_is_lost(pod, now) for pod in own),
        makes_room=observed.obstacles.get(leader.name) == "" or bool(others),
        along=frozenset(other for other, pod in observed.leaders.items() if pod.name in others),
        faltering=_is_faltering(leader, now),
    )


def _is_faltering(pod: Pod, now: datetime) -> bool:
    return pod.served_until is not None and not pod.terminating and now - pod.served_until < FALTERING_TIME


def _is_lost(pod: Pod, now: datetime) -> bool:
    return pod.ends_by is not None and now - pod.ends_by >= ENDING_TIME


def _is_unplaced(pod: Pod, now: datetime) -> bool:
    return pod.unplaced_since is not None and now - pod.unplaced_since >= PLACING_TIME
