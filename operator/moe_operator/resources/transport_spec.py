"""User input: how the components of a deployment connect to each other (spec.transport)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_operator.resources.base import Model


class Transport(Model):
    """Connections between frontends, workers and the operator; frontend.tls is for those of clients."""

    mode: Literal["Plaintext", "MutualTLS"] = Field(
        default="MutualTLS",
        description="MutualTLS: workers accept frontends and the operator only, by certificates that the "
        "operator issues and renews (Secrets moe-internal-*); frontends accept the operator likewise. The "
        "ranks of a replica of several workers exchange tensors in plaintext in either mode. Plaintext: "
        "connections are neither encrypted nor authenticated. Default: MutualTLS.",
    )

    @property
    def mutual(self) -> bool:
        """Whether the components prove to each other who they are."""
        return self.mode == "MutualTLS"
