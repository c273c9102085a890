"""Whether the model is loaded, good enough, and its experts are balanced."""

from __future__ import annotations

from moe_operator.observed.problems import QUALITY
from moe_operator.planner import mesh
from moe_operator.planner.conditions.sentences import waiting_for_replicas
from moe_operator.planner.conditions.verdict import Verdict
from moe_operator.planner.state import State
from moe_operator.resources.status import SCALED_TO_ZERO, MeshStatus


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
    return Verdict(False, "Loading", waiting_for_replicas(state).message)


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
