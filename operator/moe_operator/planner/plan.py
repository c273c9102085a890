"""The plan: (deployment, observed, now) -> Plan. All decisions are made here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from moe_operator.observed import nodes
from moe_operator.observed.children import Child, OptionalChild, StatefulSet
from moe_operator.observed.observation import Observed
from moe_operator.observed.pods import Pod
from moe_operator.planner import changes, gangs, gates, revisions, state, status_report
from moe_operator.planner.changes import Change
from moe_operator.planner.decision import Decision
from moe_operator.planner.gates import Gate
from moe_operator.planner.moves import Moves, Replica, free_ranks
from moe_operator.planner.placement import Question
from moe_operator.planner.state import State
from moe_operator.render import children, gang, worker
from moe_operator.render.objects import Key, Manifest, key
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Identity
from moe_operator.resources.status import Status

REPLICA_REMOVED = "ReplicaRemoved"


@dataclass(frozen=True)
class Deletion:
    """An object to delete; the UID protects a newer object of the same name."""

    key: Key
    uid: str
    decision: Decision | None = None
    """Why, if people want to know."""


@dataclass(frozen=True)
class Plan:
    """What to do now."""

    made: tuple[Change, ...]
    """Changes of objects to apply, in this order, after the deletions."""
    delete: tuple[Deletion, ...]
    """Objects to delete, in this order."""
    status: Status
    news: tuple[Decision, ...]
    """What is true whether or not the plan can be executed: changes of conditions and of gangs."""
    recheck: bool
    """The plan waits for something that sends no event: reconcile again soon."""
    deadline: datetime | None = None
    """When the current rollout counts as stuck, which sends no event either; None if that is past."""
    drain: tuple[str, ...] = ()
    """Addresses of workers to drain before anything is deleted (moe_operator.resources.peers)."""
    choice: tuple[Pod, ...] = ()
    """Leaders among which some were chosen for deletion without knowing their load."""
    question: Question | None = None
    """The plan needs to know whether a new replica would fit in the place of an old one."""
    fetching: tuple[Pod, ...] = ()
    """Leaders that download the model, and were not asked for their progress."""
    gates: tuple[Gate, ...] = ()
    """Readiness gates to be set."""
    unrouted: tuple[Pod, ...] = ()
    """Leaders that accept requests, but to which not every frontend may route: they are asked, and the
    deployment is reconciled again soon.
    """
    secret: Callable[[str], Manifest] | None = None
    """Makes the Secret of the deployment's gangs from a random value; None if it is not needed now."""
    due: datetime | None = None
    """When to reconcile again for a gang without an event; None if no gang needs it."""
    sound: tuple[Key, ...] = ()
    """StatefulSets that were found to match the recipe: not compared again before they change."""

    @property
    def apply(self) -> tuple[Manifest, ...]:
        """Objects to apply."""
        return tuple(change.manifest for change in self.made)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All decisions, as if everything were executed."""
        return (*self.deeds({*map(key, self.apply), *(one.key for one in self.delete)}), *self.news)

    def deeds(self, done: Collection[Key]) -> tuple[Decision, ...]:
        """The decisions that were executed. done: the objects that were applied or deleted."""
        changed = (change for change in self.made if key(change.manifest) in done)
        deleted = (one.decision for one in self.delete if one.key in done)
        return (*changes.decisions(changed), *(decision for decision in deleted if decision is not None))

    @property
    def creates(self) -> bool:
        """Whether it creates objects; changes of existing ones name their UID."""
        return any("uid" not in manifest["metadata"] for manifest in self.apply)


def plan(deployment: Deployment, observed: Observed, now: datetime) -> Plan:
    """The plan that brings the cluster closer to the deployment."""
    revision = worker.revision(deployment)
    shared = [*children.shared(deployment), revisions.current(deployment, observed)]
    foreign = _foreign(shared, observed, deployment.identity)
    conflicts = tuple(
        str(name) for name in foreign if not observed.children[name].is_of_predecessor(deployment.identity)
    )
    current = state.read(deployment, observed, revision, conflicts, now)
    moves = current.moves
    replicas = list(_replicas(deployment, observed, current, moves, now))
    desired = [*shared, *replicas]
    made = changes.changes((one for one in desired if key(one) not in foreign), observed, deployment)
    status = status_report.of_plan(deployment, current, now)
    gangs_due = gangs.next_change(current.gangs.values(), deployment.spec.parallelism, now)
    in_use = {replica.revision for replica in current.replicas.values()}
    deletions = (
        *_deletions(deployment, observed, current),
        *(_deletion(one) for one in _surplus(deployment, observed, shared)),
        *(_deletion(record) for record in revisions.outdated(deployment, observed, in_use)),
    )
    return Plan(
        made=tuple(made),
        delete=deletions,
        status=status,
        news=(
            *gangs.decisions(current.gangs.values(), now),
            *status_report.transitions(deployment.status, status),
        ),
        recheck=_is_awaited(deployment, observed, current),
        deadline=None if current.stalled else current.deadline,
        drain=_to_drain(moves, current),
        choice=_choice(moves, current) if not observed.work else (),
        question=_question(deployment, moves, current) if not observed.obstacles else None,
        fetching=() if observed.downloads else tuple(current.fetching),
        gates=(
            *gates.changes(current.leaders.values(), observed.routed),
            *(gate for own in current.pods.values() for gate in gates.of_followers(own)),
        ),
        unrouted=tuple(gates.waiting(current.leaders.values())),
        secret=partial(gang.secret, deployment)
        if gangs.secret_is_needed(current.gangs.values(), (change.manifest for change in made))
        else None,
        due=min(filter(None, (gangs_due, current.delays_due)), default=None),
        sound=_sound(replicas, made),
    )


def _replicas(
    deployment: Deployment, observed: Observed, current: State, moves: Moves, now: datetime
) -> Iterator[Manifest]:
    """The desired StatefulSets, without those known to match; those of other revisions stay."""
    leaving, recipe = {replica.data_rank for replica in moves.remove}, worker.recipe(deployment)
    for rank, replica in current.replicas.items():
        name, one = Key("StatefulSet", names.replica(deployment.name, rank)), current.gangs.get(rank)
        is_current = replica.revision == current.revision
        if rank in leaving:
            continue
        if one is not None and (one.next != one.record or (is_current and one.next.text)):
            like = None if is_current else observed.children[name].content
            yield children.gang(deployment, rank, like, one.next, now)
        elif is_current and observed.verdicts.get(name) != recipe:
            yield children.replica(deployment, rank)
    like = None if moves.revision == current.revision else _sibling(deployment, observed, moves.revision)
    for rank in free_ranks(moves.create, _taken(deployment, observed, current)):
        yield children.replica(deployment, rank, like)


def _sound(replicas: Iterable[Manifest], made: Iterable[Change]) -> tuple[Key, ...]:
    """Those of the StatefulSets that need no change."""
    changed = {key(change.manifest) for change in made}
    return tuple(name for name in map(key, replicas) if name not in changed)


def _sibling(deployment: Deployment, observed: Observed, revision: str) -> Manifest | None:
    """A StatefulSet of a revision."""
    found = observed.owned(StatefulSet, deployment.identity).values()
    return next((one.content for one in found if one.revision == revision), None)


def _taken(deployment: Deployment, observed: Observed, current: State) -> set[int]:
    """Data ranks whose names are taken: by replicas, terminating pods, or objects of others."""
    prefix = f"{deployment.name}-"
    sets = (name.name for name in observed.children if name.kind == "StatefulSet")
    ranks = (name.removeprefix(prefix) for name in sets if name.startswith(prefix))
    return {*current.replicas, *current.pods, *(int(rank) for rank in ranks if rank.isdecimal())}


def _to_drain(moves: Moves, current: State) -> tuple[str, ...]:
    leaders_leaving = (current.leaders[replica.data_rank] for replica in moves.remove if replica.ready)
    return tuple(pod.grpc_address for pod in leaders_leaving if pod.address)


def _choice(moves: Moves, current: State) -> tuple[Pod, ...]:
    if not moves.chosen:
        return ()
    return tuple(pod for pod in current.leaders.values() if pod.ready and pod.address)


def _question(deployment: Deployment, moves: Moves, current: State) -> Question | None:
    if not moves.candidates:
        return None
    unplaced = (
        rank for rank, one in current.replicas.items() if one.unplaced and one.revision == current.revision
    )
    pods = (current.unplaced_pod(rank) for rank in unplaced)
    waiting = next((pod.name for pod in pods if pod.data_rank not in current.held), "")
    ranks = [replica.data_rank for replica in moves.candidates if replica.data_rank in current.leaders]
    old = tuple(current.leaders[rank] for rank in ranks)
    others = {current.leaders[rank].name: current.pods[rank][1:] for rank in ranks}
    template = worker.pin(deployment).template
    return Question(waiting, nodes.needs(template["spec"]), old, gang.size(template), others)


def _is_awaited(deployment: Deployment, observed: Observed, current: State) -> bool:
    """Whether to reconcile again soon without an event, because a rollout depends on the time."""
    if observed.model is None and model_address(deployment, observed) is not None:
        return True
    if observed.podless(deployment.identity) or current.fetching:
        return True
    if any(pod.terminating for rank in current.replicas for pod in current.pods.get(rank, ())):
        return True
    return bool(current.old) and current.progress is not None and not current.terms.held


def model_address(deployment: Deployment, observed: Observed) -> str | None:
    """Address of a worker to ask for its model; None when there is none or the answer is known."""
    revision = worker.revision(deployment)
    known = deployment.status.model
    if known is not None and known.revision == revision:
        return None
    pods = observed.leaders.values()
    asked = (pod for pod in pods if pod.ready and pod.revision == revision and pod.address)
    return next((pod.grpc_address for pod in asked), None)


def _foreign(desired: Iterable[Manifest], observed: Observed, owner: Identity) -> list[Key]:
    """Required names that objects of others have; those are never changed."""
    found = (key(manifest) for manifest in desired)
    return [
        name for name in found if name in observed.children and not observed.children[name].belongs_to(owner)
    ]


def _deletions(deployment: Deployment, observed: Observed, current: State) -> Iterator[Deletion]:
    for replica in current.moves.remove:
        found = observed.children[Key("StatefulSet", names.replica(deployment.name, replica.data_rank))]
        yield Deletion(found.key, found.uid, _removal(deployment, replica, current))


def _surplus(
    deployment: Deployment, observed: Observed, wanted: Iterable[Manifest]
) -> Iterator[OptionalChild]:
    """Objects that the spec does not ask for any more."""
    kept = set(map(key, wanted))
    for child in observed.children.values():
        if not isinstance(child, OptionalChild) or child.key in kept or child.terminating:
            continue
        if child.belongs_to(deployment.identity):
            yield child


def _deletion(child: Child) -> Deletion:
    return Deletion(child.key, child.uid)


def _removal(deployment: Deployment, replica: Replica, current: State) -> Decision:
    name = names.replica(deployment.name, replica.data_rank)
    why = f"{current.wanted} wanted"
    if replica.revision != current.revision:
        why = f"revision {replica.revision} is replaced by {current.revision}"
    busy = f"; it finishes {replica.work} requests" if replica.work else ""
    idle = "its pod does not end, and its node does not respond" if replica.lost else "it does not serve"
    serving = busy if replica.ready else f"; {idle}"
    return Decision(REPLICA_REMOVED, f"deleted StatefulSet {name}: {why}{serving}")
