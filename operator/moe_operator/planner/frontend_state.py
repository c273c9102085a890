"""The state of a deployment's frontend, compared with the desired one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from moe_operator.observed import problems
from moe_operator.observed.children import FrontendDeployment
from moe_operator.observed.observation import Observed
from moe_operator.observed.problems import Problem, has_just_failed
from moe_operator.render.objects import Key
from moe_operator.resources import names


@dataclass(frozen=True)
class FrontendState:
    """The frontend's pods, compared with the wanted ones."""

    wanted: int = 0
    ready: int = 0
    """Ready pods, at most the wanted number."""
    updated: bool = False
    """All have the desired template, and there is no additional one."""
    problem: tuple[str, Problem] | None = None
    """The first pod that cannot start, or the Deployment that cannot create pods, and why."""


def frontend_state(observed: Observed, name: str, wanted: int, now: datetime) -> FrontendState:
    """The state of a deployment's frontend, from its Deployment and its pods."""
    found = observed.children.get(Key("Deployment", names.frontend(name)))
    if not isinstance(found, FrontendDeployment):
        return FrontendState(wanted)
    return FrontendState(
        wanted,
        min(found.ready_pods, wanted),
        found.current and found.pods == found.updated_pods == wanted,
        _problem(observed, found, now),
    )


def _problem(observed: Observed, found: FrontendDeployment, now: datetime) -> tuple[str, Problem] | None:
    # A pod that ended stays for good, and its successor has another name.
    pods = [pod for pod in observed.frontends if not pod.status.ended]
    failed = [pod for pod in observed.frontends if pod.status.ended and has_just_failed(pod.status, now)]
    for pod in (*pods, *failed):
        if (problem := pod.obstacle(now)) is not None:
            return pod.name, problem
    return None if found.refusal is None else (str(found.key), problems.of_workload(found.refusal))
