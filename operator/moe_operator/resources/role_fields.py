"""Rules and descriptions of fields that workers and frontends share."""

from __future__ import annotations

from typing import Final

from moe_operator.resources.base import number_between
from moe_operator.resources.model_spec import IMAGE

IMAGE_RULE: Final = (
    f"self.matches('^{IMAGE}$')",
    "image is a name with an optional registry, tag and digest, e.g. ghcr.io/moe-operator/worker:dev",
)
GRACE_RULE: Final = number_between("terminationGracePeriodSeconds is a number of seconds", 0, 3600)


def template_text(role: str) -> str:
    """Description of a role's pod template."""
    return (
        "A pod template (metadata.labels, metadata.annotations, spec) that is merged into the rendered one: "
        f"the container {role} is the operator's, others are added. Fields that the operator owns are "
        "refused. A change starts a rollout. Default: none."
    )
