"""The plan of a reconcile: asks nodes, workers and frontends for what it depends on, and only for that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any, TypeAlias

from moe_operator.controller.gather import gather, with_refusal
from moe_operator.controller.room import room
from moe_operator.errors import RetryableError
from moe_operator.kube.client import Cluster
from moe_operator.observed.downloads import Download
from moe_operator.observed.observation import Observed
from moe_operator.observed.pods import Pod
from moe_operator.planner.pinning import with_pins
from moe_operator.planner.plan import Plan, model_address, plan
from moe_operator.render.worker import revision
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.ports import serves_mutual_tls
from moe_operator.rpc.dialing import Dialer
from moe_operator.rpc.frontends import routed
from moe_operator.rpc.leader import download, get_model
from moe_operator.rpc.mesh import MeshReader
from moe_operator.rpc.together import ask
from moe_operator.settings import Settings

logger = logging.getLogger(__name__)

Answers: TypeAlias = dict[str, Any]
"""Fields of an observation."""
Call: TypeAlias = Callable[[], Answers]
"""A call to pods."""


@dataclass(frozen=True)
class Planning:
    """Makes plans, with all that they depend on. Blocking; may run in several threads at once."""

    cluster: Cluster
    settings: Settings
    clock: Callable[[], datetime]
    active: Callable[[Collection[str]], Mapping[str, int]]
    """Returns the active requests of workers by address, without workers that do not respond."""
    dialer: Dialer
    _meshes: MeshReader = field(default_factory=MeshReader)
    _thought: threading.Lock = field(default_factory=threading.Lock)
    """Only one thread at a time reads the cache and plans. The interpreter runs one thread at a time anyway;
    threads that compete for its lock, as every decompression does, take four times as long.
    """

    def gathered(self, deployment: Deployment) -> Observed:
        """The observed objects. Raises ReadForbiddenError if a right to read is missing."""
        with self._thought:
            observed = gather(self.cluster, deployment)
        return with_refusal(self.cluster, deployment, observed)

    def secures_pods(self, deployment: Deployment, observed: Observed) -> bool:
        """Whether new pods of the deployment serve mutual TLS. Pinned ones from before an upgrade may not."""
        if not deployment.spec.transport.mutual:
            return False
        with self._thought:
            pins = with_pins(deployment, observed).pinned
        return any(serves_mutual_tls(pin.template, role) for role, pin in pins.items())

    def planned(self, deployment: Deployment, observed: Observed) -> tuple[Deployment, Observed, Plan]:
        """The plan and its inputs: pinned pods, and the responses of workers and frontends."""
        with self._thought:
            deployment = with_pins(deployment, observed)
        observed = _answered(observed, [*self._of_meshes(observed), *self._of_model(deployment, observed)])
        todo = self._plan(deployment, observed)
        if todo.question is not None:
            found = room(self.cluster, deployment.identity.namespace, todo.question)
            observed = replace(observed, obstacles=found.obstacles, together=found.together)
            todo = self._plan(deployment, observed)
        if todo.choice or todo.unrouted or todo.fetching:
            observed = self._asked(observed, todo)
            todo = self._plan(deployment, observed)
        return deployment, observed, todo

    def _plan(self, deployment: Deployment, observed: Observed) -> Plan:
        with self._thought:
            return plan(deployment, observed, self.clock())

    def _asked(self, observed: Observed, todo: Plan) -> Observed:
        """The observation, extended by what the plan needs from workers and frontends."""
        limit = self.settings.rpc_timeout_seconds

        def routes() -> Answers:
            return {"routed": routed(observed.frontends, todo.unrouted, limit, observed.routes, self.dialer)}

        calls: list[Call] = []
        if todo.choice:
            calls.append(lambda: {"work": self._work(todo.choice)})
        if todo.unrouted:
            calls.append(routes)
        if todo.fetching:
            calls.append(lambda: {"downloads": self._downloads(todo.fetching)})
        return _answered(observed, calls)

    def _downloads(self, pods: Iterable[Pod]) -> dict[str, Download]:
        """How far the downloads of the model are, of pods that say it."""
        limit = self.settings.rpc_timeout_seconds
        found = ask(lambda pod: download(pod.address, limit), pods)
        return {pod.name: told for pod, told in found if told is not None}

    def _work(self, pods: Iterable[Pod]) -> dict[str, int]:
        """Active requests on each; one that does not respond counts as idle, because it probably hangs."""
        addresses = {pod.name: pod.grpc_address for pod in pods}
        active = self.active(tuple(addresses.values()))
        return {name: active.get(address, 0) for name, address in addresses.items()}

    def _of_model(self, deployment: Deployment, observed: Observed) -> Iterator[Call]:
        """What a worker serves, if that is not known."""
        address, limit = model_address(deployment, observed), self.settings.rpc_timeout_seconds

        def model(address: str) -> Answers:
            try:
                return {"model": get_model(address, revision(deployment), limit, self.dialer)}
            except RetryableError as error:
                # The plan requests another reconcile soon; nothing else has to wait for a busy worker.
                logger.info("%s: %s", deployment.name, error)
                return {}

        if address is not None:
            yield partial(model, address)

    def _of_meshes(self, observed: Observed) -> Iterator[Call]:
        """What the ready leaders of gangs report of their ranks."""
        gangs = [pod for pod in observed.leaders.values() if pod.shape and pod.ready and pod.address]
        limit = self.settings.rpc_timeout_seconds
        if gangs:
            yield lambda: {"meshes": self._meshes.read(gangs, limit, self.dialer)}


def _answered(observed: Observed, calls: Iterable[Call]) -> Observed:
    """The observation with the answers to calls, which are made at the same time.

    A pod that does not respond takes the whole timeout of a call; so do several of them together.
    """
    for _, answers in ask(lambda call: call(), calls):
        observed = replace(observed, **answers)
    return observed
