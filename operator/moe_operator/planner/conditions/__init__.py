"""Converts the state of a deployment to conditions, with a reason for programs and a message for people.

verdict      a condition before it has a time
readiness    Ready, Active
progress     Progressing
model        ModelLoaded, QualityGate, ExpertsBalanced
sentences    what several of them say
"""

from __future__ import annotations

from dataclasses import replace

from moe_operator.planner.conditions.model import experts_balanced, model_loaded, quality_gate
from moe_operator.planner.conditions.progress import progressing
from moe_operator.planner.conditions.readiness import active, ready
from moe_operator.planner.conditions.verdict import Verdict, dated
from moe_operator.planner.state import State
from moe_operator.resources.status import (
    ACTIVE,
    DEPRECATED_FIELDS,
    DONE,
    EXPERTS_BALANCED,
    MODEL_LOADED,
    PROGRESSING,
    QUALITY_GATE,
    READY,
    RECONCILING,
    STALLED,
)

__all__ = ["Verdict", "abnormal", "dated", "verdicts"]


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
