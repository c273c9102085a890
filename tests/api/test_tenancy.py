"""What frontends tell workers about clients survives the way, and nothing else is believed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.tenancy import KEYS, MalformedTenancyError, Tenancy, tenancy_of

TENANCIES = st.builds(
    Tenancy,
    tenant=st.from_regex(r"([A-Za-z0-9][A-Za-z0-9._:@/|-]{0,252})?", fullmatch=True),
    weight=st.integers(1, 1000),
    priority=st.integers(0, 9),
    salt=st.from_regex(r"[0-9a-f]{0,64}", fullmatch=True),
)


@given(TENANCIES)
def test_a_worker_reads_what_a_frontend_says(tenancy):
    assert tenancy_of([("user-agent", "x"), *tenancy.metadata()]) == tenancy


def test_a_call_without_these_keys_has_no_tenant():
    assert tenancy_of(None) == tenancy_of([("x-request-id", "1")]) == Tenancy()
    assert Tenancy().metadata() == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("x-moe-tenant", "a" * 254),
        ("x-moe-tenant", "two words"),
        ("x-moe-weight", "0"),
        ("x-moe-weight", "1001"),
        ("x-moe-weight", "1e3"),
        ("x-moe-priority", "10"),
        ("x-moe-priority", "-1"),
        ("x-moe-salt", "g"),
        ("x-moe-salt", "a" * 65),
    ],
)
def test_a_malformed_value_is_refused_with_its_key(key, value):
    with pytest.raises(MalformedTenancyError, match=f"{key} is malformed; send it once, as"):
        tenancy_of([(key, value)])


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_key_that_occurs_twice_is_refused(key):
    with pytest.raises(MalformedTenancyError, match=key):
        tenancy_of([(key, "1"), (key, "1")])
