"""Keeps the rendering of pods until an edit changes them (docs/adr/0012).

A newer operator may render pods differently and have other defaults; neither is a reason to restart a worker.
An edit and a requested restart are. So an object with a pod template has an annotation with that template and
the spec from which it was rendered. If this operator renders that spec and the current one equally, no edit
of these pods lies between the two, and the pinned template is used again, also for new replicas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from pydantic import ValidationError

from moe_operator.observed.children import Child, FrontendDeployment, StatefulSet
from moe_operator.observed.observation import Observed
from moe_operator.render import frontend, worker
from moe_operator.render.objects import Manifest
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Pin
from moe_operator.resources.ports import serves_mutual_tls
from moe_operator.resources.spec import Spec
from moe_operator.resources.transport_spec import Transport

_CARRIERS: Final[Mapping[str, tuple[type[Child], Callable[[Deployment], Manifest]]]] = {
    names.ROLE_WORKER: (StatefulSet, worker.rendered),
    names.ROLE_FRONTEND: (FrontendDeployment, frontend.rendered),
}


def with_pins(deployment: Deployment, observed: Observed) -> Deployment:
    """The deployment with the pinned templates that are still valid, otherwise with new ones."""
    workers = _workers(deployment, observed)
    secure = serves_mutual_tls(workers.template, names.ROLE_WORKER)
    secure = secure or _has_secure_workers(deployment, observed)
    deployment = replace(deployment, has_secure_workers=secure)
    frontends = _current(names.ROLE_FRONTEND, deployment.for_frontends, observed)
    if secure and not serves_mutual_tls(frontends.template, names.ROLE_FRONTEND):
        # They were rendered when plaintext was the default, and could not call these workers.
        frontends = _fresh(names.ROLE_FRONTEND, deployment.for_frontends)
    return replace(deployment, pinned={names.ROLE_WORKER: workers, names.ROLE_FRONTEND: frontends})


def _workers(deployment: Deployment, observed: Observed) -> Pin:
    """The template of workers. Without replicas none is pinned, and those of the frontends tell what it was:
    in plaintext while theirs are in plaintext, from when that was the default, although it is not any more.
    """
    workers = _current(names.ROLE_WORKER, deployment, observed)
    if not deployment.spec.transport.mutual or observed.owned(StatefulSet, deployment.identity):
        return workers
    frontends = _current(names.ROLE_FRONTEND, deployment, observed)
    if serves_mutual_tls(frontends.template, names.ROLE_FRONTEND):
        return workers
    plain = deployment.spec.model_copy(update={"transport": Transport(mode="Plaintext")})
    return Pin(workers.spec, worker.rendered(replace(deployment, spec=plain)))


def _current(role: str, deployment: Deployment, observed: Observed) -> Pin:
    """The first pinned template of a role that is still valid, otherwise a new one."""
    kind, render = _CARRIERS[role]
    carriers = sorted(observed.owned(kind, deployment.identity).items())
    pins = (_pin(carrier) for _, carrier in carriers)
    fresh = _fresh(role, deployment)
    return next((pin for pin in pins if pin is not None and _holds(pin, fresh, deployment, render)), fresh)


def _fresh(role: str, deployment: Deployment) -> Pin:
    """The template as this operator renders it."""
    _, render = _CARRIERS[role]
    return Pin(deployment.spec.manifest(), render(deployment))


def _has_secure_workers(deployment: Deployment, observed: Observed) -> bool:
    """Whether a worker serves mutual TLS, or will when its StatefulSet has created its pod again."""
    sets = observed.owned(StatefulSet, deployment.identity).values()
    workers = (pod for pod in observed.pods if pod.role == names.ROLE_WORKER)
    return any(found.secure for found in sets) or any(pod.secure for pod in workers)


def _pin(carrier: Child) -> Pin | None:
    """The pin of an object; None if there is none, or somebody edited it."""
    text = carrier.annotations.get(names.ANNOTATION_PINNED)
    try:
        pin: dict[str, Any] = json.loads(text) if text else {}
        whole = isinstance(pin["template"]["spec"], dict) and isinstance(pin["template"]["metadata"], dict)
        return Pin(pin["spec"], pin["template"]) if whole else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _holds(pin: Pin, fresh: Pin, deployment: Deployment, render: Callable[[Deployment], Manifest]) -> bool:
    """Whether no edit of these pods lies between the pinned spec and the current one."""
    if pin.restarted_at != fresh.restarted_at:
        return False
    if pin.spec == fresh.spec:
        return True
    try:
        then = replace(deployment, spec=Spec.model_validate(pin.spec))
    except ValidationError:
        # The pinned spec is not valid any more.
        return False
    return render(then) == fresh.template
