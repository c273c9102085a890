"""From a deployment's state to its conditions, each with a reason for programs and a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from moe_operator.manifests.decision import timestamp
from moe_operator.manifests.problems import QUALITY, Problem
from moe_operator.manifests.state import State
from moe_operator.resources.status import MODEL_LOADED, PROGRESSING, QUALITY_GATE, READY, Condition, Status

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Verdict:
    """A condition before it has a time."""

    holds: bool
    reason: str
    message: str

    @property
    def status(self) -> Literal["True", "False"]:
        """As Kubernetes writes it."""
        return "True" if self.holds else "False"


def verdicts(state: State) -> dict[str, Verdict]:
    """What holds of a deployment, by condition type."""
    found = {READY: ready(state), PROGRESSING: progressing(state), MODEL_LOADED: model_loaded(state)}
    return {**found, QUALITY_GATE: quality_gate(state)} if state.gated else found


def ready(state: State) -> Verdict:
    """Whether every replica and the frontend answer."""
    if state.conflicts:
        return Verdict(False, "NameConflict", _conflict_sentence(state))
    if state.wanted == 0:
        return Verdict(False, "ScaledToZero", _nobody_sentence(state))
    count = _count(state)
    if state.ready < state.wanted:
        return _not_all_ready(state, count)
    if state.frontend_ready == 0:
        problem = state.frontend_problem or Problem("FrontendNotReady", "it is starting")
        return Verdict(False, problem.reason, f"{count}; no frontend does: {problem.message}")
    return Verdict(True, "AllReplicasReady", f"{count}, and so does the frontend")


def _nobody_sentence(state: State) -> str:
    if state.on_demand:
        return "there were no requests; the next one is held until a replica is there"
    return "no replica is wanted; set spec.replicas to 1 or more to serve requests"


def _replicas(number: int) -> str:
    return f"{number} replica" if number == 1 else f"{number} replicas"


def _count(state: State) -> str:
    verb = "answers" if state.wanted == 1 else "answer"
    return f"{min(state.ready, state.wanted)} of {_replicas(state.wanted)} {verb}"


def _not_all_ready(state: State, count: str) -> Verdict:
    reason = "ReplicasNotReady" if state.problem is None else state.problem[1].reason
    return Verdict(False, reason, f"{count}; {_obstacle(state)}")


def _obstacle(state: State) -> str:
    """What keeps replicas from answering."""
    if state.problem is None:
        return _waiting_for(state)
    pod, problem = state.problem
    return f"{pod.name}: {problem.message}"


def _waiting_for(state: State) -> str:
    pods = state.unready_pods
    if not pods:
        return "waiting for their pods to be made"
    more = f" and {len(pods) - _NAMES_SHOWN} more" if len(pods) > _NAMES_SHOWN else ""
    return f"waiting for {', '.join(pods[:_NAMES_SHOWN])}{more} to load the model"


def progressing(state: State) -> Verdict:
    """Whether work towards the spec goes on. False is both done and stuck; the reason says which."""
    if state.conflicts:
        return Verdict(False, "NameConflict", _conflict_sentence(state))
    held = _held(state) or _no_room(state)
    if held is not None:
        return held
    if state.problem is not None and state.problem[1].stuck:
        pod, problem = state.problem
        return Verdict(False, problem.reason, f"{pod.name} cannot start: {problem.message}")
    return _replicas_progressing(state) or _frontend_progressing(state) or _complete(state)


def _complete(state: State) -> Verdict:
    if state.old:
        count = f"{state.updated} of {_replicas(state.wanted)} at revision {state.revision}"
        stay = f"spec.rollout.partition leaves {len(state.old)} at an older one"
        return Verdict(False, "PartitionReached", f"{count}; {stay}")
    return Verdict(False, "Complete", f"{_replicas(state.wanted)} at revision {state.revision}")


def _held(state: State) -> Verdict | None:
    """A rollout that does not go on by itself."""
    count = f"{state.updated} of {_replicas(state.wanted)} at revision {state.revision}"
    if state.old and state.rollout.pause:
        return Verdict(False, "Paused", f"{count}; set spec.rollout.pause to false to go on")
    if state.stalled:
        limit = state.rollout.progress_deadline_seconds
        why = f"no further replica was ready for {limit} s"
        if state.problem is not None:
            why += f"; {state.problem[0].name}: {state.problem[1].message}"
        return Verdict(
            False, "ProgressDeadlineExceeded", f"{count}; {why}; edit the spec, or undo the rollout"
        )
    return None


def _no_room(state: State) -> Verdict | None:
    """New replicas fit no node, and no old one may make room."""
    unplaced = [rank for rank, replica in state.replicas.items() if replica.unplaced]
    if not (state.old and unplaced) or state.surplus > len(unplaced) or state.moves.remove:
        return None
    pod = state.leaders[unplaced[0]]
    said = pod.problem.message if pod.problem is not None else "no node takes it"
    advice = "free resources, or raise spec.rollout.maxUnavailable so that an old replica makes room"
    return Verdict(False, "InsufficientCapacity", f"{pod.name}: {said}; {advice}")


def _replicas_progressing(state: State) -> Verdict | None:
    staying = min(state.rollout.partition, state.wanted)
    if len(state.old) > staying:
        message = f"{state.updated} of {_replicas(state.wanted)} at revision {state.revision}"
        return Verdict(True, "RollingOut", message)
    if state.surplus:
        return Verdict(True, "ScalingDown", f"{_replicas(state.surplus)} more than wanted on the way out")
    if state.ready < state.wanted:
        return Verdict(True, "Starting", f"{_count(state)}; {_obstacle(state)}")
    return None


def _frontend_progressing(state: State) -> Verdict | None:
    # Without a worker no frontend becomes Ready, so a change of it waits for the first replica.
    if state.frontend_updated or state.wanted == 0:
        return None
    problem = state.frontend_problem
    if problem is not None and problem.stuck:
        message = f"the frontend cannot be brought up to date: {problem.message}"
        return Verdict(False, problem.reason, message)
    return Verdict(True, "RollingOut", "the frontend is being brought up to date")


def model_loaded(state: State) -> Verdict:
    """Whether at least one worker has loaded the model."""
    if state.ready:
        return Verdict(True, "Loaded", _model_sentence(state))
    if state.problem is not None:
        pod, problem = state.problem
        return Verdict(False, problem.reason, f"{pod.name}: {problem.message}")
    if state.wanted == 0:
        return Verdict(False, "ScaledToZero", "no worker is wanted")
    return Verdict(False, "Loading", _waiting_for(state))


def quality_gate(state: State) -> Verdict:
    """Whether the checkpoint is as good as spec.quality asks; a worker that loads it has found so."""
    if state.problem is not None and state.problem[1].reason == QUALITY:
        pod, problem = state.problem
        return Verdict(False, QUALITY, f"{pod.name}: {problem.message}")
    if state.updated and state.ready:
        return Verdict(True, "Passed", "the checkpoint's quality.json is within spec.quality")
    return Verdict(False, "NotChecked", "no worker of this revision has read the checkpoint's report yet")


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
    return f"{found} exists and belongs to somebody else; delete or rename it, or rename this MoEDeployment"


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
                message=verdict.message,
                observed_generation=generation,
                last_transition_time=before.last_transition_time if before and same else timestamp(now),
            )
        )
    return tuple(conditions)
