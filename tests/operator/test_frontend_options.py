"""Tenants, the output cache and routing reach the frontend, and change nothing by default."""

import pytest

from moe_api import tenancy
from moe_frontend.policy import tenants
from moe_frontend.policy.balancing import POLICIES
from moe_operator.render import frontend
from moe_operator.resources.frontend_spec import Frontend
from moe_operator.resources.tenants_spec import TENANTS_MOST, TenantLimits
from tests.operator.worlds import deployment


def environment(**spec):
    (container,) = frontend.pod_spec(deployment(**spec))["containers"]
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_no_variable_says_anything_while_the_cache_is_off():
    assert not [name for name in environment() if "CACHE" in name or "ROUTING" in name or "TENANTS" in name]


@pytest.mark.parametrize(("ttl", "seconds"), [("90s", "90"), ("30m", "1800"), ("2h", "7200")])
def test_memory_and_ttl_become_bytes_and_seconds(ttl, seconds):
    outputs = {"mode": "Deterministic", "memory": "64Mi", "ttl": ttl}
    given = environment(cache={"outputs": outputs})
    assert given["MOE_OUTPUT_CACHE"] == str(64 * 2**20)
    assert given["MOE_OUTPUT_CACHE_TTL"] == seconds


def test_every_policy_that_a_spec_may_name_is_one_of_the_frontend():
    names = Frontend.model_fields["routing"].annotation.__args__
    given = {environment(frontend={"routing": name}).get("MOE_ROUTING", "least-loaded") for name in names}
    assert given == set(POLICIES)


def test_tenants_are_what_the_frontend_reads():
    given = environment(
        frontend={
            "tenants": [
                {"name": "search", "weight": 4, "priority": 5},
                {"name": "batch/a", "requestsPerMinute": 600, "tokensPerMinute": 200_000, "concurrency": 64},
            ],
            "defaultTenant": {"requestsPerMinute": 60},
        }
    )
    assert tenants.parse(given["MOE_TENANTS"]) == tenants.TenantsConfig(
        tenants=(
            tenants.TenantClass("search", weight=4, priority=5),
            tenants.TenantClass(
                "batch/a", requests_per_minute=600, tokens_per_minute=200_000, concurrency=64
            ),
        ),
        default_tenant=tenants.TenantClass(requests_per_minute=60),
    )


def test_the_spec_and_the_frontend_have_the_same_bounds():
    assert tenants.TENANTS_MOST == TENANTS_MOST
    rules = {
        name: field.json_schema_extra["x-kubernetes-validations"][0]["rule"]
        for name, field in TenantLimits.model_fields.items()
    }
    assert rules["weight"] == f"self >= 1 && self <= {tenancy.WEIGHT_MOST}"
    assert rules["priority"] == f"self >= 0 && self <= {tenancy.PRIORITY_MOST}"


def test_the_largest_list_of_tenants_fits_into_a_variable():
    """The kernel takes 128 KiB for one, and a Kubernetes object 256 KiB of annotations."""
    longest = [
        {
            "name": f"{number:0253}",
            "weight": 1000,
            "requestsPerMinute": 10**9,
            "tokensPerMinute": 10**12,
            "concurrency": 10**6,
            "priority": 9,
        }
        for number in range(TENANTS_MOST)
    ]
    assert len(environment(frontend={"tenants": longest})["MOE_TENANTS"]) < 64 * 1024
