"""Progress of the current rollout, and its deadline."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from moe_operator.planner.decision import timestamp
from moe_operator.planner.frontend_state import FrontendState
from moe_operator.planner.moves import Replica
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.status import RolloutStatus


def progress(
    deployment: Deployment,
    replicas: dict[int, Replica],
    frontend: FrontendState,
    revision: str,
    now: datetime,
) -> RolloutStatus | None:
    """Progress of the current rollout, from its last recorded state; None if there is none.

    As with a Deployment of apps/v1, a rollout is over once everything was ready at its revision: pods that
    fail later and replicas that scaling adds have no deadline.
    """
    if not _is_under_way(deployment, replicas, frontend, revision):
        return None
    before, counts = deployment.status.rollout, (ready_at(revision, replicas), frontend.ready)
    if before is not None and before.revision == revision and not _is_paused(deployment, replicas, revision):
        most = (max(counts[0], before.ready_replicas), max(counts[1], before.ready_frontends))
        if most == (before.ready_replicas, before.ready_frontends):
            return before
        counts = most
    return RolloutStatus(
        revision=revision,
        ready_replicas=counts[0],
        ready_frontends=counts[1],
        progressed_at=timestamp(now),
    )


def _is_under_way(
    deployment: Deployment, replicas: dict[int, Replica], frontend: FrontendState, revision: str
) -> bool:
    """Whether a rollout has begun, of workers or of the frontend, and is not complete."""
    wanted, before = deployment.wanted_replicas, deployment.status
    old = sum(replica.revision != revision for replica in replicas.values())
    staying = min(deployment.spec.rollout.partition, wanted)
    begun = before.revision != revision or before.rollout is not None
    # Without a worker no frontend becomes Ready, so a change of it waits for the first replica.
    routed = wanted == 0 or (frontend.updated and frontend.ready == frontend.wanted)
    complete = routed and old <= staying and ready_at(revision, replicas) >= wanted - old
    return not complete and (begun or old > staying or (wanted > 0 and not frontend.updated))


def _is_paused(deployment: Deployment, replicas: dict[int, Replica], revision: str) -> bool:
    return deployment.spec.rollout.is_paused and any(one.revision != revision for one in replicas.values())


def ready_at(revision: str, replicas: Mapping[int, Replica]) -> int:
    """Ready replicas of a revision."""
    return sum(replica.ready and replica.revision == revision for replica in replicas.values())


def deadline(deployment: Deployment, progress: RolloutStatus) -> datetime:
    """When the rollout counts as stuck unless it progresses."""
    limit = timedelta(seconds=deployment.spec.rollout.progress_deadline_seconds)
    return datetime.fromisoformat(progress.progressed_at) + limit
