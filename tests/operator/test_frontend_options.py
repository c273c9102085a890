"""`spec.cache.outputs` and `spec.frontend.routing` reach the frontend, and change nothing by default."""

import pytest

from moe_frontend.policy.balancing import POLICIES
from moe_operator.render import frontend
from moe_operator.resources.frontend_spec import Frontend
from tests.operator.worlds import deployment


def environment(**spec):
    (container,) = frontend.pod_spec(deployment(**spec))["containers"]
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_no_variable_says_anything_while_the_cache_is_off():
    assert not [name for name in environment() if "CACHE" in name or "ROUTING" in name]


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
