"""Sentences that several conditions share: counts, and why a deployment is not ready."""

from __future__ import annotations

from dataclasses import replace

from moe_operator.observed.problems import Problem
from moe_operator.planner.state import State

_NAMES_SHOWN = 3


def count(state: State) -> str:
    """Ready replicas of the wanted ones."""
    return f"{min(state.ready, state.wanted)}/{state.wanted} replicas ready"


def updated_count(state: State) -> str:
    """The same at the desired revision."""
    return f"{state.updated}/{state.wanted} replicas ready at revision {state.revision}"


def frontend_count(state: State) -> str:
    """Ready frontends of the wanted ones."""
    return f"{state.frontend.ready}/{state.frontend.wanted} frontends ready"


def frontends_missing(state: State) -> bool:
    """Whether fewer frontends are ready than wanted."""
    return state.frontend.ready < state.frontend.wanted


def why_not_ready(state: State) -> Problem | None:
    """Why the deployment is not ready: first problems, then what only needs time."""
    if state.ready < state.wanted and state.problem is not None:
        pod, problem = state.problem
        return replace(problem, message=f"{pod.title}: {problem.message}")
    if frontends_missing(state) and state.frontend.problem is not None:
        name, problem = state.frontend.problem
        return replace(problem, message=f"{frontend_count(state)}; {name}: {problem.message}")
    if state.ready < state.wanted:
        return waiting_for_replicas(state)
    if frontends_missing(state):
        return Problem("FrontendNotReady", f"{frontend_count(state)}; waiting for them to become ready")
    return None


def waiting_for_replicas(state: State) -> Problem:
    """What the replicas that are not ready wait for."""
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
        return Problem("FrontendNotReady", f"{frontend_count(state)}; {waiting}")
    if pods:
        return Problem("ReplicasNotReady", f"waiting for {_names([p.name for p in pods])} to terminate")
    return Problem("ReplicasNotReady", "waiting for their pods to be created")


def _names(pods: list[str]) -> str:
    more = f" and {len(pods) - _NAMES_SHOWN} more" if len(pods) > _NAMES_SHOWN else ""
    return f"{', '.join(pods[:_NAMES_SHOWN])}{more}"


def conflict_sentence(state: State) -> str:
    """Which names are taken, and the remedy."""
    found = ", ".join(state.conflicts)
    return f"{found} exists and belongs to another owner; choose another name for this MoEDeployment"
