"""Converts the state of a deployment to conditions, with a reason for programs and a message for people."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from moe_api.visible import one_line
from moe_operator.observed.problems import QUALITY, Problem, no_node, scheduler_says
from moe_operator.observed.scheduling import lacks_resources
from moe_operator.planner import mesh
from moe_operator.planner.decision import timestamp
from moe_operator.planner.state import State
from moe_operator.resources.status import (
    ACTIVE,
    COMPLETE,
    DEPRECATED_FIELDS,
    DONE,
    EXPERTS_BALANCED,
    MODEL_LOADED,
    PARTITION_REACHED,
    PROGRESSING,
    QUALITY_GATE,
    READY,
    RECONCILING,
    SCALED_TO_ZERO,
    STALLED,
    Condition,
    MeshStatus,
    Status,
)

_NAMES_SHOWN = 3
_MESSAGE_MOST = 4096
"""Maximum characters of a message: Kubernetes allows 32768, which nobody reads."""


@dataclass(frozen=True)
class Verdict:
    """A condition before it has a time."""

    holds: bool | None
    """None: not known, or neither."""
    reason: str
    message: str

    @property
    def status(self) -> Literal["True", "False", "Unknown"]:
        """As Kubernetes writes it."""
        if self.holds is None:
            return "Unknown"
        return "True" if self.holds else "False"


def verdicts(state: State) -> dict[str, Verdict]:
    """The conditions of a deployment, by type."""
    progress = progressing(state)
    found = {
        READY: ready(state),
        ACTIVE: active(state),
        PROGRESSING: progress,
        MODEL_LOADED: model_loaded(state),
        **abnormal(progress),
    }
    if state.gated:
        found[QUALITY_GATE] = quality_gate(state)
    if state.deprecated:
        found[DEPRECATED_FIELDS] = Verdict(True, "DeprecatedFieldUsed", "; ".join(state.deprecated))
    if state.mesh is not None and state.imbalance_most is not None:
        found[EXPERTS_BALANCED] = experts_balanced(state.mesh, state.imbalance_most)
    return found


def abnormal(progress: Verdict) -> dict[str, Verdict]:
    """The conditions that kstatus reads, which exist only while they are True.

    progress: the verdict on Progressing. `Stalled` holds where it is False, `Reconciling` while it is not
    done (sigs.k8s.io/cli-utils, pkg/kstatus).
    """
    if progress.holds is False:
        return {STALLED: replace(progress, holds=True)}
    if progress.reason not in DONE:
        return {RECONCILING: replace(progress, holds=True)}
    return {}


def ready(state: State) -> Verdict:
    """Whether all wanted replicas and frontends are ready; True if none is wanted."""
    if state.conflicts:
        return Verdict(False, "NameConflict", _conflict_sentence(state))
    if state.wanted == 0 and not (state.on_demand and _frontends_missing(state)):
        return Verdict(True, SCALED_TO_ZERO, _nobody_sentence(state))
    obstacle = _obstacle(state)
    if obstacle is not None:
        return Verdict(False, obstacle.reason, f"{_count(state)}; {obstacle.message}")
    return Verdict(True, "AllReplicasReady", f"{_count(state)}, {_frontend_count(state)}")


def active(state: State) -> Verdict:
    """Whether a replica serves requests now; a deployment that is scaled to zero is not active, by design."""
    if state.wanted == 0:
        return Verdict(False, SCALED_TO_ZERO, _nobody_sentence(state))
    if state.ready:
        return Verdict(True, "Serving", _count(state))
    return Verdict(None, "Activating", _count(state))


def _nobody_sentence(state: State) -> str:
    if state.on_demand:
        return "there were no requests; the next one is held until a replica is ready"
    return "no replica is wanted; set spec.replicas to 1 or more to serve requests"


def _replicas(number: int) -> str:
    return f"{number} replica" if number == 1 else f"{number} replicas"


def _count(state: State) -> str:
    return f"{min(state.ready, state.wanted)}/{state.wanted} replicas ready"


def _updated_count(state: State) -> str:
    return f"{state.updated}/{state.wanted} replicas ready at revision {state.revision}"


def _frontend_count(state: State) -> str:
    return f"{state.frontend.ready}/{state.frontend.wanted} frontends ready"


def _frontends_missing(state: State) -> bool:
    return state.frontend.ready < state.frontend.wanted


def _obstacle(state: State) -> Problem | None:
    """Why the deployment is not ready: first problems, then what only needs time."""
    if state.ready < state.wanted and state.problem is not None:
        pod, problem = state.problem
        return replace(problem, message=f"{pod.title}: {problem.message}")
    if _frontends_missing(state) and state.frontend.problem is not None:
        name, problem = state.frontend.problem
        return replace(problem, message=f"{_frontend_count(state)}; {name}: {problem.message}")
    if state.ready < state.wanted:
        return _waiting_for_replicas(state)
    if _frontends_missing(state):
        return Problem("FrontendNotReady", f"{_frontend_count(state)}; waiting for them to become ready")
    return None


def _waiting_for_replicas(state: State) -> Problem:
    pods = state.unready_pods
    if state.download is not None:
        pod, text = state.download
        return Problem("ReplicasNotReady", f"{pod.title} downloads the model: {text}")
    loading = [state.described(pod) for pod in pods if not pod.containers_ready and not pod.terminating]
    unrouted = [pod.name for pod in pods if pod.containers_ready]
    if loading:
        return Problem("ReplicasNotReady", f"waiting for {_names(loading)} to load the model")
    if unrouted:
        waiting = f"waiting for the frontends to route to {_names(unrouted)}"
        return Problem("FrontendNotReady", f"{_frontend_count(state)}; {waiting}")
    if pods:
        return Problem("ReplicasNotReady", f"waiting for {_names([p.name for p in pods])} to terminate")
    return Problem("ReplicasNotReady", "waiting for their pods to be created")


def _names(pods: list[str]) -> str:
    more = f" and {len(pods) - _NAMES_SHOWN} more" if len(pods) > _NAMES_SHOWN else ""
    return f"{', '.join(pods[:_NAMES_SHOWN])}{more}"


def progressing(state: State) -> Verdict:
    """Whether the rollout progresses, by the conventions of Deployment (apps/v1).

    True while a rollout runs and when it is complete, False when it is stuck, Unknown when it is paused.
    """
    return (
        _stuck(state)
        or _paused(state)
        or _no_room(state)
        or _replicas_progressing(state)
        or _frontend_progressing(state)
        or _complete(state)
    )


def _stuck(state: State) -> Verdict | None:
    """A rollout that cannot continue without help."""
    if state.conflicts:
        return Verdict(False, "NameConflict", _conflict_sentence(state))
    if state.stalled:
        return Verdict(False, "ProgressDeadlineExceeded", _deadline_sentence(state))
    if state.problem is not None and state.problem[1].stuck:
        pod, problem = state.problem
        return Verdict(False, problem.reason, f"{pod.title} cannot start: {problem.message}")
    return None


def _deadline_sentence(state: State) -> str:
    limit = state.rollout.progress_deadline_seconds
    cause = _deadline_cause(state)
    parts = (
        _updated_count(state),
        f"nothing further was ready for {limit} s",
        cause.message,
        cause.remedy,
        "or undo the rollout" if state.old else "",
    )
    return "; ".join(filter(None, parts))


def _deadline_cause(state: State) -> Problem:
    """Why the rollout did not continue."""
    if state.problem is not None:
        pod, problem = state.problem
        return replace(problem, message=f"{pod.title}: {problem.message}")
    return _obstacle(state) or _waiting_for_replicas(state)


def _paused(state: State) -> Verdict | None:
    if not (state.old and state.rollout.is_paused):
        return None
    return Verdict(None, "Paused", f"{_updated_count(state)}; set spec.rollout.paused to false to go on")


def _no_room(state: State) -> Verdict | None:
    """New replicas fit no node, and no old one may be deleted for them."""
    moves = state.moves
    unplaced = [rank for rank, replica in state.replicas.items() if replica.unplaced]
    waits = unplaced and state.surplus <= len(unplaced)
    in_place = state.rollout.max_surge == 0 and moves.candidates and not moves.create
    if not state.old or not (waits or in_place) or moves.remove:
        return None
    if not unplaced:
        said = "spec.rollout.maxSurge is 0, so a new replica needs the place of an old one"
        return Verdict(True, "InsufficientCapacity", f"{said}; {_why_no_room(state)}{_remedy(state)}")
    pod = state.unplaced_pod(unplaced[0])
    problem = pod.problem or Problem("Unschedulable", "")
    cause, end = f"{pod.title}: {no_node(problem.said)}", scheduler_says(problem.said)
    if not lacks_resources(problem.said):
        remedy = "correct spec.worker, add a node, or undo the rollout"
        return Verdict(True, problem.reason, f"{cause}; {remedy}{end}")
    return Verdict(True, "InsufficientCapacity", f"{cause}; {_why_no_room(state)}{_remedy(state)}{end}")


def _why_no_room(state: State) -> str:
    """Why the first candidate for deletion does not free enough room; empty if there is none."""
    ranks = (replica.data_rank for replica in state.moves.candidates)
    leaders = (state.leaders[rank].name for rank in ranks if rank in state.leaders)
    found = ((name, state.obstacles[name]) for name in leaders if state.obstacles.get(name))
    return next((f"it would not fit in the place of {name}: {why}; " for name, why in found), "")


def _remedy(state: State) -> str:
    """Remedies that do not stop serving replicas."""
    advice = "free resources, add a node, or undo the rollout"
    if state.wanted < 2 or state.rollout.unavailable(state.wanted):
        return advice
    return f"{advice}; with spec.rollout.maxUnavailable 1 an old replica makes room where the new one fits"


def _replicas_progressing(state: State) -> Verdict | None:
    staying = min(state.rollout.partition, state.wanted)
    if state.wanted and len(state.old) > staying:
        trouble = f"{state.problem[0].title}: {state.problem[1].message}; " if state.problem else ""
        return Verdict(True, "RollingOut", f"{trouble}{_updated_count(state)}")
    if state.surplus:
        return Verdict(True, "ScalingDown", f"{_replicas(state.surplus)} more than wanted, terminating")
    if state.ready < state.wanted:
        obstacle = _obstacle(state)
        return Verdict(True, "Starting", f"{_count(state)}; {obstacle.message if obstacle else 'starting'}")
    return None


def _frontend_progressing(state: State) -> Verdict | None:
    # Without a worker no frontend becomes Ready, so a change of it waits for the first replica.
    frontend = state.frontend
    if state.wanted == 0 or (frontend.updated and not _frontends_missing(state)):
        return None
    message = f"{_frontend_count(state)}"
    if not frontend.updated:
        message += "; the frontend rolls out"
    if frontend.problem is not None:
        message += f"; {frontend.problem[0]}: {frontend.problem[1].message}"
    return Verdict(True, "Starting" if frontend.updated else "RollingOut", message)


def _complete(state: State) -> Verdict:
    if state.old:
        stay = f"spec.rollout.partition leaves {len(state.old)} at an older one"
        return Verdict(True, PARTITION_REACHED, f"{_updated_count(state)}; {stay}")
    return Verdict(True, COMPLETE, _updated_count(state))


def model_loaded(state: State) -> Verdict:
    """Whether at least one worker has loaded the model."""
    if state.loaded:
        return Verdict(True, "Loaded", _model_sentence(state))
    if state.wanted == 0:
        return Verdict(None, SCALED_TO_ZERO, "no worker is wanted")
    if state.problem is not None:
        pod, problem = state.problem
        return Verdict(False, problem.reason, f"{pod.title}: {problem.message}")
    if state.download is not None:
        return Verdict(False, "Downloading", state.download[1])
    return Verdict(False, "Loading", _waiting_for_replicas(state).message)


def quality_gate(state: State) -> Verdict:
    """Whether the checkpoint satisfies spec.quality, as found by a worker that loads it."""
    if state.problem is not None and state.problem[1].reason == QUALITY:
        pod, problem = state.problem
        return Verdict(False, QUALITY, f"{pod.title}: {problem.message}")
    if state.updated or (state.model is not None and state.model.revision == state.revision):
        return Verdict(True, "Passed", "the checkpoint's quality.json is within spec.quality")
    return Verdict(None, "NotChecked", "no worker of this revision has read the checkpoint's report yet")


def experts_balanced(found: MeshStatus, most: int) -> Verdict:
    """Whether the ranks of each stage have about the same load, in every layer of every replica."""
    gang = mesh.worst(found)
    if gang is None or gang.imbalance_percentage is None:
        return Verdict(None, "NotMeasured", "no replica has reported the load of its ranks yet")
    load = f"{gang.imbalance_percentage} % of the mean load of its stage in layer {gang.layer}"
    where = f"{gang.name}: rank {gang.busiest_rank} of the stage has {load}"
    if gang.imbalance_percentage <= most:
        return Verdict(True, "Balanced", f"{where}, the most of all layers")
    remedy = "raise spec.parallelism.redundantExperts, or let the engine rebalance"
    return Verdict(False, "Imbalanced", f"{where}, and {most} % is allowed; {remedy}")


def _model_sentence(state: State) -> str:
    model = state.model
    if model is None or model.revision != state.revision:
        return "the model is loaded"
    total, active = _short(model.parameters_total), _short(model.parameters_active)
    return f"{model.architecture}, {total} parameters of which a token uses {active}, in {model.format}"


def _short(count: int) -> str:
    """A count with three digits and a unit: 671B, 11.2M."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return str(count)


def _conflict_sentence(state: State) -> str:
    found = ", ".join(state.conflicts)
    return f"{found} exists and belongs to another owner; choose another name for this MoEDeployment"


def dated(
    found: dict[str, Verdict], previous: Status, generation: int, now: datetime
) -> tuple[Condition, ...]:
    """The conditions with their times: lastTransitionTime moves only when the status changes."""
    conditions = []
    for kind, verdict in found.items():
        before = previous.condition(kind)
        same = before is not None and before.status == verdict.status
        conditions.append(
            Condition(
                type=kind,
                status=verdict.status,
                reason=verdict.reason,
                message=one_line(verdict.message, _MESSAGE_MOST),
                observed_generation=generation,
                last_transition_time=before.last_transition_time if before and same else timestamp(now),
            )
        )
    return tuple(conditions)
