"""Whether a deployment is ready, and whether it serves."""

from __future__ import annotations

from moe_operator.planner.conditions.sentences import (
    conflict_sentence,
    count,
    frontend_count,
    frontends_missing,
    why_not_ready,
)
from moe_operator.planner.conditions.verdict import Verdict
from moe_operator.planner.state import State
from moe_operator.resources.status import SCALED_TO_ZERO


def ready(state: State) -> Verdict:
    """Whether all wanted replicas and frontends are ready; True if none is wanted."""
    if state.conflicts:
        return Verdict(False, "NameConflict", conflict_sentence(state))
    if state.wanted == 0 and not (state.on_demand and frontends_missing(state)):
        return Verdict(True, SCALED_TO_ZERO, _nobody_sentence(state))
    obstacle = why_not_ready(state)
    if obstacle is not None:
        return Verdict(False, obstacle.reason, f"{count(state)}; {obstacle.message}")
    return Verdict(True, "AllReplicasReady", f"{count(state)}, {frontend_count(state)}")


def active(state: State) -> Verdict:
    """Whether a replica serves requests now; a deployment that is scaled to zero is not active, by design."""
    if state.wanted == 0:
        return Verdict(False, SCALED_TO_ZERO, _nobody_sentence(state))
    if state.ready:
        return Verdict(True, "Serving", count(state))
    return Verdict(None, "Activating", count(state))


def _nobody_sentence(state: State) -> str:
    if state.on_demand:
        return "there were no requests; the next one is held until a replica is ready"
    return "no replica is wanted; set spec.replicas to 1 or more to serve requests"
