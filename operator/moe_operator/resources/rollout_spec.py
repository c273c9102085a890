"""User input for rollouts: spec.rollout."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from moe_operator.resources.base import Model, number_between, rules

_MOST = 1000


class Rollout(Model):
    """How a new revision replaces an old one."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                # Defaults of the fields come after the check of this object's own default, {}.
                "!has(self.maxSurge) || !has(self.maxUnavailable) || "
                "self.maxSurge + self.maxUnavailable >= 1",
                "maxSurge and maxUnavailable must not both be 0: no replica could ever change",
            )
        )
    )

    max_surge: int = Field(
        default=1,
        description="Additional replicas during a rollout: the operator deletes an old replica when a new"
        " one is Ready. If a new one fits no node but would fit in the place of an old one, "
        "the old one is deleted first, within maxUnavailable. Default: 1.",
        json_schema_extra=rules(number_between("maxSurge is a number", 0, _MOST)),
    )
    max_unavailable: int | None = Field(
        default=None,
        description="Wanted replicas that may be missing during a rollout if there is no room for surge. "
        "0 never deletes a serving replica first. Default: 1, but 0 if one replica is wanted "
        "and maxSurge is not 0.",
        json_schema_extra=rules(number_between("maxUnavailable is a number", 0, _MOST)),
    )
    partition: int = Field(
        default=0,
        description="Replicas that stay at the old revision: with 4 replicas, 3 leaves one canary. "
        "Default: 0.",
        json_schema_extra=rules(number_between("partition is a number", 0, _MOST)),
    )
    paused: bool | None = Field(
        default=None,
        description="Keeps every replica at its revision until this is false again; scaling continues. "
        "Default: false.",
    )
    pause: bool | None = Field(
        default=None, description="Deprecated: use paused, which takes precedence. Default: none."
    )
    progress_deadline_seconds: int = Field(
        default=3600,
        description="A rollout stops if no further replica becomes Ready for this long; serving replicas "
        "stay until the spec is edited. Default: 3600, because loading a large checkpoint "
        "takes long.",
        json_schema_extra=rules(number_between("progressDeadlineSeconds is a number", 1, 604800)),
    )

    @property
    def is_paused(self) -> bool:
        """Whether every replica keeps its revision: `paused`, or what an earlier version called `pause`."""
        return bool(self.paused if self.paused is not None else self.pause)

    def unavailable(self, wanted: int) -> int:
        """Replicas of the wanted ones that may be missing."""
        if self.max_unavailable is not None:
            return self.max_unavailable
        return 1 if wanted > 1 or self.max_surge == 0 else 0
