"""User input: what tenants may use."""

from __future__ import annotations

from pydantic import Field

from moe_operator.resources.base import Model, number_between, rules

TENANTS_MOST = 100


class TenantLimits(Model):
    """What a tenant may use."""

    weight: int = Field(
        default=1,
        description="Share of the machines relative to other tenants that have requests at the same time. "
        "Default: 1.",
        json_schema_extra=rules(number_between("weight is a number", 1, 1000)),
    )
    requests_per_minute: int | None = Field(
        default=None,
        description="Requests per minute at each frontend pod; as many may come at once. Default: no limit.",
        json_schema_extra=rules(number_between("requestsPerMinute is a number", 1, 1000000000)),
    )
    tokens_per_minute: int | None = Field(
        default=None,
        description="Tokens of prompts and texts per minute at each frontend pod; as many may come at once. "
        "Default: no limit.",
        json_schema_extra=rules(number_between("tokensPerMinute is a number", 1, 1000000000000)),
    )
    concurrency: int | None = Field(
        default=None,
        description="Requests in progress at each frontend pod. Default: no limit.",
        json_schema_extra=rules(number_between("concurrency is a number of requests", 1, 1000000)),
    )
    priority: int = Field(
        default=0,
        description="Highest priority that its requests may have, and that of requests that name none, 0 to "
        "9. Default: 0.",
        json_schema_extra=rules(number_between("priority is a number", 0, 9)),
    )


class Tenant(TenantLimits):
    """A tenant and what it may use."""

    name: str = Field(
        description="The tenant, as its API keys or its tokens name it. Required.",
        min_length=1,
        max_length=253,
        pattern="^[A-Za-z0-9][A-Za-z0-9._:@/|-]*$",
    )
