"""The observed objects of the cluster, as far as they concern one deployment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from moe_operator.observed import children, pods, routes
from moe_operator.observed.children import Child, StatefulSet
from moe_operator.observed.downloads import Download
from moe_operator.observed.pods import Pod
from moe_operator.observed.routes import Routes
from moe_operator.render.objects import Key, Manifest
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.status import ModelInfo

AnyChild = TypeVar("AnyChild", bound=Child)


@dataclass(frozen=True)
class Observed:
    """The cluster, as far as it concerns one deployment."""

    children: Mapping[Key, Child] = field(default_factory=dict)
    """Objects that carry the deployment's label, and objects of others under names that it wants."""
    pods: tuple[Pod, ...] = ()
    """Pods that carry the deployment's label."""
    model: ModelInfo | None = None
    """The model as just reported by a Ready leader; None if none was asked or none responded."""
    work: Mapping[str, int] = field(default_factory=dict)
    """Active requests of leaders, by pod name; only if they were asked."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why pods cannot be created, by pod name; only of pods that are missing."""
    routed: Mapping[str, str] = field(default_factory=dict)
    """Addresses of the leaders to which every frontend routes, by pod name; if they were asked."""
    obstacles: Mapping[str, str] = field(default_factory=dict)
    """Why a new replica's pod would not fit in the place of a leader, by pod name; empty text if it would.
    Only if it was checked.
    """
    together: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The other leaders that must be deleted too, by pod name; only if the pod would fit in all their places
    together, and in none alone.
    """
    verdicts: Mapping[Key, str] = field(default_factory=dict)
    """The recipe (worker.recipe) that an earlier reconcile found this version of a StatefulSet to match."""
    downloads: Mapping[str, Download] = field(default_factory=dict)
    """How far downloads of the model are, by pod name; if they were asked."""
    routes: Mapping[str, Routes] = field(default_factory=dict)
    """Published routes of frontends, by the UID of the frontend's pod."""
    meshes: Mapping[str, Any] = field(default_factory=dict)
    """What leaders of gangs report (mesh.MeshReading), by pod name; only of those that responded."""

    @cached_property
    def workers(self) -> Mapping[int, tuple[Pod, ...]]:
        """The workers of each replica in order of their ranks, by data rank.

        A successor takes precedence over a terminating pod.
        """
        found: dict[int, dict[int, Pod]] = {}
        for pod in self.pods:
            if pod.role == names.ROLE_WORKER:
                replica = found.setdefault(pod.data_rank, {})
                if pod.rank not in replica or replica[pod.rank].terminating:
                    replica[pod.rank] = pod
        return {rank: tuple(pod for _, pod in sorted(own.items())) for rank, own in sorted(found.items())}

    @cached_property
    def leaders(self) -> Mapping[int, Pod]:
        """The leader of each replica, by data rank."""
        return {data_rank: own[0] for data_rank, own in self.workers.items() if own[0].rank == 0}

    @cached_property
    def frontends(self) -> tuple[Pod, ...]:
        """The frontend's pods."""
        return tuple(pod for pod in self.pods if pod.role == names.ROLE_FRONTEND)

    def owned(self, kind: type[AnyChild], owner: Identity) -> dict[str, AnyChild]:
        """Children of one class that are this deployment's, by name."""
        return {
            child.key.name: child
            for child in self.children.values()
            if isinstance(child, kind) and child.belongs_to(owner)
        }

    def podless(self, owner: Identity) -> list[str]:
        """StatefulSets whose controller has created no pod after observing them: the pod was refused."""
        there = {pod.name for pod in self.pods}
        return [
            name
            for name, found in self.owned(StatefulSet, owner).items()
            if found.wanted
            and found.observed
            and not (found.terminating or found.pods)
            and f"{name}-0" not in there
        ]


def observe(
    objects: Iterable[Manifest] = (),
    pods_there: Iterable[Manifest] = (),
    routes_there: Iterable[Manifest] = (),
) -> Observed:
    """Parses objects of a deployment, its pods and FrontendRoutes, as the API server returns them."""
    found = map(children.read, objects)
    return Observed(
        {child.key: child for child in found},
        tuple(map(pods.read, pods_there)),
        routes=routes.published(routes_there),
    )
