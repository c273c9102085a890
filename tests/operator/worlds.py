"""A cluster in a dictionary: enough of Kubernetes to run plans against, one step at a time.

It applies what a plan says, and plays the StatefulSet controller and the kubelet when told to.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from moe_operator.observed.observation import Observed, observe
from moe_operator.planner.decision import timestamp
from moe_operator.planner.pinning import with_pins
from moe_operator.planner.plan import Plan, plan
from moe_operator.render.objects import Key, key
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Identity
from moe_operator.resources.spec import Spec
from moe_operator.resources.status import Condition, ModelInfo, Status

START = datetime(2026, 1, 1, tzinfo=UTC)


def deployment(**spec: Any) -> Deployment:
    return Deployment(
        Identity("default", "docs", "uid-docs", 1),
        Spec.model_validate({"model": {"uri": "file:///mnt/models/docs-moe"}, **spec}),
        Status(),
    )


@dataclass
class World:
    deployment: Deployment
    children: dict[Key, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    now: datetime = START
    model: ModelInfo | None = None
    work: dict[str, int] = field(default_factory=dict)
    obstacle: str = ""
    """Why a new pod would not fit in the place of an old one."""
    together: bool = False
    """Whether it would in the places of all old ones together."""

    @property
    def status(self) -> Status:
        return self.deployment.status

    def observed(self, **more: Any) -> Observed:
        return replace(observe(self.children.values(), self.pods.values()), **more)

    def planned(self) -> Plan:
        """What one reconcile plans now."""
        observed = self.observed(model=self.model, work=self.work)
        deployment = with_pins(self.deployment, observed)
        todo = plan(deployment, observed, self.now)
        if todo.question is None:
            return todo
        obstacles = {pod.name: self.obstacle for pod in todo.question.old}
        old = frozenset(obstacles)
        together = {name: old - {name} for name in old} if self.together else {}
        return plan(deployment, replace(observed, obstacles=obstacles, together=together), self.now)

    def step(self) -> Plan:
        """One reconcile: plan, apply, write the status; a second passes."""
        todo = self.planned()
        for manifest in todo.apply:
            self._apply(copy.deepcopy(manifest))
        for deletion in todo.delete:
            del self.children[deletion.key]
            for name in [pod for pod in self.pods if pod.rpartition("-")[0] == deletion.key.name]:
                self._end(name)
        self.deployment = replace(self.deployment, status=todo.status)
        self.now += timedelta(seconds=1)
        return todo

    def _end(self, name: str) -> None:
        """The kubelet: a pod without an owner ends, unless it should have ended before and did not."""
        if "deletionTimestamp" not in self.pods.get(name, {}).get("metadata", {}):
            self.pods.pop(name, None)

    def _apply(self, manifest: dict[str, Any]) -> None:
        name = key(manifest)
        manifest["metadata"]["uid"] = f"uid-{name}"
        before = self.children.get(name, {})
        self.children[name] = {**before, **manifest}
        if name.kind == "StatefulSet":
            self._roll(name.name, manifest)

    def _roll(self, name: str, manifest: dict[str, Any]) -> None:
        """The StatefulSet controller: replaces a pod of another revision by one that is not Ready yet."""
        size, common = manifest["spec"]["replicas"], manifest["spec"]["template"]["metadata"]["labels"]
        for pod in [one for one in self.pods if one.rpartition("-")[0] == name]:
            if int(pod.rpartition("-")[2]) >= size:
                del self.pods[pod]
        for ordinal in range(size):
            pod, labels = f"{name}-{ordinal}", {**common, names.LABEL_POD_INDEX: str(ordinal)}
            if self.pods.get(pod, {}).get("metadata", {}).get("labels") != labels:
                self.pods[pod] = {
                    "metadata": {"name": pod, "labels": labels},
                    "spec": {"nodeName": "node"},
                    "status": {"podIP": f"10.244.0.{9 + ordinal}", "conditions": []},
                }

    def change(self, **spec: Any) -> None:
        manifest = {**self.deployment.spec.manifest(), **spec}
        identity = replace(self.deployment.identity, generation=self.deployment.identity.generation + 1)
        self.deployment = replace(self.deployment, identity=identity, spec=Spec.model_validate(manifest))

    def ready(self, *ranks: int, ready: bool = True) -> None:
        """The kubelet: the leaders' readiness probes pass, or fail."""
        for rank in ranks:
            status = self.pods[f"docs-{rank}-0"]["status"]
            status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
            status["containerStatuses"] = [{"name": "worker", "ready": ready, "state": {"running": {}}}]

    def all_ready(self) -> None:
        self.ready(*self.revisions())

    def falter(self, rank: int) -> None:
        """The kubelet: the probe of a leader that was Ready fails."""
        failed = {"type": "Ready", "status": "False", "lastTransitionTime": timestamp(self.now)}
        self.pods[f"docs-{rank}-0"]["status"]["conditions"] = [
            failed,
            {"type": names.ROUTED, "status": "True"},
        ]

    def unplace(
        self, *ranks: int, message: str = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    ) -> None:
        """The scheduler: no node takes the leaders."""
        for rank in ranks:
            self.pods[f"docs-{rank}-0"]["status"]["conditions"] = [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": message,
                    "lastTransitionTime": timestamp(self.now),
                }
            ]

    def frontend_ready(self, count: int = 1) -> None:
        status = {"replicas": 1, "updatedReplicas": 1, "readyReplicas": count}
        self.children[Key("Deployment", "docs-frontend")]["status"] = status

    def fail(self, rank: int, code: int, log: str) -> None:
        """The container of a leader ended, and the kubelet waits before the next try."""
        end = {"terminated": {"exitCode": code, "reason": "Error", "message": log}}
        self.pods[f"docs-{rank}-0"]["status"]["containerStatuses"] = [
            {
                "name": "worker",
                "ready": False,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": end,
            }
        ]

    def lose_node(self, *ranks: int) -> None:
        """The node controller: the leaders' node does not report any more."""
        for rank in ranks:
            status = self.pods[f"docs-{rank}-0"]["status"]
            status["conditions"] = [
                {"type": "Ready", "status": "False"},
                {"type": "ContainersReady", "status": "True"},
            ]

    def evict(self, *ranks: int, grace_s: int = 30) -> None:
        """The leaders' pods are to end, and their nodes do not say that they have."""
        for rank in ranks:
            end = timestamp(self.now + timedelta(seconds=grace_s))
            self.pods[f"docs-{rank}-0"]["metadata"]["deletionTimestamp"] = end

    def condition(self, kind: str) -> Condition:
        """A condition of the status, which has it."""
        found = self.status.condition(kind)
        assert found is not None, kind
        return found

    def revisions(self) -> dict[int, str]:
        """Revision of each replica's StatefulSet."""
        found = {}
        for name, manifest in self.children.items():
            if name.kind == "StatefulSet":
                labels = manifest["spec"]["template"]["metadata"]["labels"]
                found[int(labels[names.LABEL_DATA_RANK])] = labels[names.LABEL_REVISION]
        return dict(sorted(found.items()))

    def serving(self) -> int:
        """Leaders that answer now."""
        conditions = (pod["status"]["conditions"] for pod in self.pods.values())
        return sum(bool(found) and found[0]["status"] == "True" for found in conditions)


def settled(replicas: int = 2, **spec: Any) -> World:
    """A deployment that is Ready."""
    world = World(deployment(replicas=replicas, **spec))
    world.step()
    world.ready(*range(replicas))
    world.frontend_ready()
    world.model = ModelInfo(
        architecture="deepseek_v3",
        parameters_total=11_200_000,
        parameters_active=4_100_000,
        format="fp32",
        context_length=2048,
        revision=world.status.revision,
    )
    world.step()
    world.model = None
    world.step()
    return world
