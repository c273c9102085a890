"""Whether the rollout of a deployment progresses."""

from __future__ import annotations

from dataclasses import replace

from moe_operator.observed.problems import Problem, no_node, scheduler_says
from moe_operator.observed.scheduling import lacks_resources
from moe_operator.planner.conditions.sentences import (
    conflict_sentence,
    count,
    frontend_count,
    frontends_missing,
    updated_count,
    waiting_for_replicas,
    why_not_ready,
)
from moe_operator.planner.conditions.verdict import Verdict
from moe_operator.planner.state import State
from moe_operator.resources.status import COMPLETE, PARTITION_REACHED


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
        return Verdict(False, "NameConflict", conflict_sentence(state))
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
        updated_count(state),
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
    return why_not_ready(state) or waiting_for_replicas(state)


def _paused(state: State) -> Verdict | None:
    if not (state.old and state.rollout.is_paused):
        return None
    return Verdict(None, "Paused", f"{updated_count(state)}; set spec.rollout.paused to false to continue")


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
        return Verdict(True, "RollingOut", f"{trouble}{updated_count(state)}")
    if state.surplus:
        return Verdict(True, "ScalingDown", f"{_replicas(state.surplus)} more than wanted, terminating")
    if state.ready < state.wanted:
        obstacle = why_not_ready(state)
        return Verdict(True, "Starting", f"{count(state)}; {obstacle.message if obstacle else 'starting'}")
    return None


def _replicas(number: int) -> str:
    return f"{number} replica" if number == 1 else f"{number} replicas"


def _frontend_progressing(state: State) -> Verdict | None:
    # Without a worker no frontend becomes Ready, so a change of it waits for the first replica.
    frontend = state.frontend
    if state.wanted == 0 or (frontend.updated and not frontends_missing(state)):
        return None
    message = f"{frontend_count(state)}"
    if not frontend.updated:
        message += "; the frontend rolls out"
    if frontend.problem is not None:
        message += f"; {frontend.problem[0]}: {frontend.problem[1].message}"
    return Verdict(True, "Starting" if frontend.updated else "RollingOut", message)


def _complete(state: State) -> Verdict:
    if state.old:
        stay = f"spec.rollout.partition leaves {len(state.old)} at an older one"
        return Verdict(True, PARTITION_REACHED, f"{updated_count(state)}; {stay}")
    return Verdict(True, COMPLETE, updated_count(state))
