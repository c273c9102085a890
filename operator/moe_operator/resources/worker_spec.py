"""User input: the pods that run the model (spec.worker)."""

from __future__ import annotations

from pydantic import Field

from moe_operator.resources import names
from moe_operator.resources.accelerator import AcceleratedPodSettings
from moe_operator.resources.base import rules
from moe_operator.resources.pod_template import WorkerTemplate
from moe_operator.resources.role_fields import GRACE_RULE, IMAGE_RULE, template_text


class Worker(AcceleratedPodSettings):
    """The pods that run the model."""

    image: str = Field(
        default=names.DEFAULT_WORKER_IMAGE,
        description=f"Image of the workers. Default: {names.DEFAULT_WORKER_IMAGE}.",
        min_length=1,
        max_length=512,
        json_schema_extra=rules(IMAGE_RULE),
    )
    termination_grace_period_seconds: int = Field(
        default=60,
        description="Seconds that a terminating worker has to finish its requests. Default: 60.",
        json_schema_extra=rules(GRACE_RULE),
    )
    pod_template: WorkerTemplate | None = Field(default=None, description=template_text("worker"))
