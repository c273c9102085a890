"""A deployment that scales, as a reconcile observed it."""

from __future__ import annotations

from dataclasses import dataclass

from moe_operator.autoscaling.coldstart import ColdStart, measure
from moe_operator.autoscaling.model.spec import ScalingSpec
from moe_operator.observed.observation import Observed
from moe_operator.observed.pods import Pod
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.scaling_spec import Mode, Scaling
from moe_operator.resources.spec import Spec

_PRIOR_SHARE = 0.1
"""Assumed requests per second for each request of a full batch: a request takes 10 s."""


@dataclass(frozen=True)
class Subject:
    """What the scaler needs of one deployment."""

    deployment: Deployment
    scaling: Scaling
    leaders: tuple[Pod, ...]
    """One of each replica, without terminating ones."""
    frontends: tuple[str, ...]
    """Addresses (moe_operator.resources.peers)."""
    cold_starts: tuple[ColdStart, ...]
    """Of the leaders that are Ready."""

    @property
    def ready(self) -> tuple[Pod, ...]:
        """Leaders that are ready."""
        return tuple(pod for pod in self.leaders if pod.ready)

    @property
    def addresses(self) -> frozenset[str]:
        """Whoever may be asked."""
        return frozenset(pod.grpc_address for pod in self.leaders if pod.address).union(self.frontends)

    @property
    def uids(self) -> frozenset[str]:
        """Of the leaders, ready or not: one that is not ready for a moment was measured nevertheless."""
        return frozenset(pod.uid for pod in self.leaders)

    @property
    def spec(self) -> ScalingSpec:
        """Limits and aims in the scaler's terms."""
        return scaling_spec(self.deployment.spec, self.scaling)


def subject(deployment: Deployment, observed: Observed) -> Subject | None:
    """The deployment as a subject of scaling; None where it does not scale, or scaling is Off."""
    wanted = deployment.spec.scaling
    if wanted is None or wanted.mode is Mode.OFF:
        return None
    pods = tuple(pod for pod in observed.leaders.values() if not pod.terminating)
    starts = (measure(pod) for pod in pods if pod.ready)
    return Subject(
        deployment,
        wanted,
        pods,
        tuple(pod.admin_address for pod in observed.frontends if pod.reachable),
        tuple(start for start in starts if start is not None),
    )


def scaling_spec(spec: Spec, wanted: Scaling) -> ScalingSpec:
    """spec.scaling in the scaler's terms: work is requests, and rates are per minute."""
    prior = wanted.assumed_throughput
    if prior is None:
        prior = _PRIOR_SHARE * spec.max_batch_size
    return ScalingSpec(
        min_replicas=wanted.min_replicas,
        max_replicas=wanted.max_replicas,
        capacity_prior=60.0 * prior,
        gpus_per_replica=spec.parallelism.ranks * spec.worker.gpus,
        gpu_limit=wanted.gpus_most,
    )
