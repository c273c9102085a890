"""Pods that take a GPU or half of one: spec.worker.acceleratorFraction."""

from __future__ import annotations

from typing import Final

from pydantic import ConfigDict, Field

from moe_operator.resources import quantity
from moe_operator.resources.base import rules
from moe_operator.resources.pods import PodSettings

GPU: Final = "nvidia.com/gpu"
_RESOURCE_PATTERN = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
_RULES = (
    (
        "!has(self.acceleratorFraction) || self.acceleratorFraction != 0.5 || has(self.acceleratorResource)",
        "acceleratorFraction 0.5 needs acceleratorResource: the resource that stands for half a GPU on your "
        "nodes, e.g. nvidia.com/mig-3g.40gb or nvidia.com/gpu.shared",
    ),
    (
        "!has(self.acceleratorResource) || has(self.acceleratorFraction)",
        "acceleratorResource says nothing without acceleratorFraction: set it to 0.5 or 1",
    ),
    (
        "!has(self.acceleratorFraction) || !has(self.resources.limits) || "
        f"!self.resources.limits.exists(name, name == '{GPU}' || "
        "(has(self.acceleratorResource) && name == self.acceleratorResource))",
        "acceleratorFraction asks for the GPU: take it out of resources.limits",
    ),
)


class AcceleratedPodSettings(PodSettings):
    """Settings of pods that compute."""

    model_config = ConfigDict(json_schema_extra=rules(*_RULES))

    accelerator_fraction: float | None = Field(
        default=None,
        description="Share of a GPU that one worker takes, 0.5 or 1; 0.5 needs a resource that stands for "
        "half a GPU, by MIG or time-slicing. Default: what resources.limits says.",
        json_schema_extra=rules(
            ("self == 0.5 || self == 1.0", "acceleratorFraction is 0.5 or 1, a share of one GPU")
        ),
    )
    accelerator_resource: str | None = Field(
        default=None,
        description="Resource of which a worker takes one piece for acceleratorFraction, e.g. "
        f"nvidia.com/mig-3g.40gb or nvidia.com/gpu.shared. Default: {GPU} for a whole GPU; 0.5 has none.",
        min_length=1,
        max_length=317,
        pattern=_RESOURCE_PATTERN,
    )

    @property
    def accelerators(self) -> dict[str, int]:
        """Pieces of the accelerator resource that acceleratorFraction stands for; empty without it."""
        if self.accelerator_fraction is None:
            return {}
        return {self.accelerator_resource or GPU: 1}

    @property
    def gpus(self) -> float:
        """GPUs that one worker takes; 0 where it takes none."""
        if self.accelerator_fraction is not None:
            return self.accelerator_fraction
        limits = self.resources.limits or {}
        return float(quantity.parse(limits.get(GPU, 0)))
