"""`spec.cache.outputs` reaches the frontend, and changes nothing where it is off."""

import pytest

from moe_operator.render import frontend
from tests.operator.worlds import deployment


def environment(**spec):
    (container,) = frontend.pod_spec(deployment(**spec))["containers"]
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_no_variable_says_anything_while_the_cache_is_off():
    assert not [name for name in environment() if "CACHE" in name]


@pytest.mark.parametrize(("ttl", "seconds"), [("90s", "90"), ("30m", "1800"), ("2h", "7200")])
def test_memory_and_ttl_become_bytes_and_seconds(ttl, seconds):
    outputs = {"mode": "Deterministic", "memory": "64Mi", "ttl": ttl}
    given = environment(cache={"outputs": outputs})
    assert given["MOE_OUTPUT_CACHE"] == str(64 * 2**20)
    assert given["MOE_OUTPUT_CACHE_TTL"] == seconds
