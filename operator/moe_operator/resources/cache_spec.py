"""User input: results that are stored, so that they need not be computed again (spec.cache)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_operator.resources import duration, quantity
from moe_operator.resources.base import Model, rules
from moe_operator.resources.pods import Amount


class OutputCache(Model):
    """Answers that frontends store, so that an equal request needs no worker."""

    mode: Literal["Off", "Deterministic"] = Field(
        default="Off",
        description="Deterministic: whole answers of requests with temperature 0 or a seed are stored, and "
        "equal requests of the same client get them. Off: nothing is stored. Default: Off.",
    )
    memory: Amount = Field(
        default="256Mi",
        description="Memory of each frontend pod for answers, e.g. 256Mi. Default: 256Mi.",
    )
    ttl: str = Field(
        default="1h",
        description="How long an answer is valid: a number and s, m or h, e.g. 30m. Default: 1h.",
        max_length=duration.LENGTH_MOST,
        json_schema_extra=rules(duration.rule("ttl", "30m")),
    )

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return int(quantity.parse(self.memory))

    @property
    def ttl_seconds(self) -> int:
        """`ttl` in seconds."""
        return duration.seconds(self.ttl)


class Cache(Model):
    """Results that are stored, so that they need not be computed again."""

    outputs: OutputCache = Field(default=OutputCache(), description="Whole answers, in the frontends.")
