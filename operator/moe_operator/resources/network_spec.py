"""User input: NetworkPolicies of the pods (spec.networkPolicy)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_operator.resources.base import Model


class NetworkPolicies(Model):
    """NetworkPolicies of the pods; they need a network plugin that enforces them."""

    mode: Literal["Off", "Restricted"] = Field(
        default="Off",
        description="Restricted: workers accept connections of the frontends, of the operator and, in "
        "replicas of several workers, of the deployment's other workers; frontends accept clients on the "
        "ports of the API. Metrics stay readable. Off: there are no policies. Default: Off.",
    )
