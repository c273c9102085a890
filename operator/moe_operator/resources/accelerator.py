"""Pods that take a GPU or half of one: spec.worker.acceleratorPercentage."""

from __future__ import annotations

from typing import Final

from pydantic import ConfigDict, Field

from moe_operator.resources import quantity
from moe_operator.resources.base import rules
from moe_operator.resources.pods import PodSettings

GPU: Final = "nvidia.com/gpu"
_RESOURCE_PATTERN = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"


def share_set(pod: str) -> str:
    """CEL: whether the pod settings at a path set a share of a GPU, under the present name or the old one."""
    return f"(has({pod}.acceleratorPercentage) || has({pod}.acceleratorFraction))"


def halves(pod: str) -> str:
    """CEL: whether the pod settings at a path ask for half a GPU."""
    old = f"has({pod}.acceleratorFraction) && {pod}.acceleratorFraction == 0.5"
    return f"(has({pod}.acceleratorPercentage) ? {pod}.acceleratorPercentage == 50 : {old})"


def takes_gpu(pod: str) -> str:
    """CEL: whether the pod settings at a path ask for a GPU or a part of one."""
    limits = f"{pod}.resources.limits"
    return f"({share_set(pod)} || has({limits}) && {limits}.exists(name, name.startsWith('nvidia.com/')))"


_RULES = (
    (
        f"!{halves('self')} || has(self.acceleratorResource)",
        "acceleratorPercentage 50 needs acceleratorResource: the resource that stands for half a GPU on your "
        "nodes, e.g. nvidia.com/mig-3g.40gb or nvidia.com/gpu.shared",
    ),
    (
        f"!has(self.acceleratorResource) || {share_set('self')}",
        "acceleratorResource has no effect without acceleratorPercentage: set it to 50 or 100",
    ),
    (
        f"!{share_set('self')} || !has(self.resources.limits) || "
        f"!self.resources.limits.exists(name, name == '{GPU}' || "
        "(has(self.acceleratorResource) && name == self.acceleratorResource))",
        "acceleratorPercentage requests the GPU: remove it from resources.limits",
    ),
)


class AcceleratedPodSettings(PodSettings):
    """Settings of pods that compute."""

    model_config = ConfigDict(json_schema_extra=rules(*_RULES))

    accelerator_percentage: int | None = Field(
        default=None,
        description="Share of a GPU that one worker takes, in percent: 50 or 100. 50 needs a resource that "
        "stands for half a GPU, by MIG or time-slicing. Default: what resources.limits says.",
        json_schema_extra=rules(
            ("self == 50 || self == 100", "acceleratorPercentage is 50 or 100, a share of one GPU")
        ),
    )
    accelerator_fraction: float | None = Field(
        default=None,
        description="Deprecated: use acceleratorPercentage, which takes precedence. Default: none.",
        json_schema_extra=rules(
            ("self == 0.5 || self == 1.0", "acceleratorFraction is 0.5 or 1, a share of one GPU")
        ),
    )
    accelerator_resource: str | None = Field(
        default=None,
        description="Resource of which a worker takes one piece for acceleratorPercentage, e.g. "
        f"nvidia.com/mig-3g.40gb or nvidia.com/gpu.shared. Default: {GPU} for a whole GPU; half a GPU has "
        "no default.",
        min_length=1,
        max_length=317,
        pattern=_RESOURCE_PATTERN,
    )

    @property
    def accelerators(self) -> dict[str, int]:
        """Pieces of the accelerator resource that acceleratorPercentage stands for; empty without it."""
        if self._share is None:
            return {}
        return {self.accelerator_resource or GPU: 1}

    @property
    def gpus(self) -> float:
        """GPUs that one worker takes; 0 where it takes none."""
        if self._share is not None:
            return self._share
        limits = self.resources.limits or {}
        return float(quantity.parse(limits.get(GPU, 0)))

    @property
    def _share(self) -> float | None:
        """Share of a GPU, 0.5 or 1; None if only resources.limits says what a worker takes."""
        if self.accelerator_percentage is not None:
            return self.accelerator_percentage / 100
        return self.accelerator_fraction
