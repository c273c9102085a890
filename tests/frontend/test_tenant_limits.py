"""Limits of tenants as timelines; the bounds hold for any sequence of requests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_frontend.policy.tenants import KNOWN_MOST, OTHER, Directory, TenantClass, TenantsConfig, parse

A_MINUTE = 60.0


def use(**limits):
    return Directory(TenantsConfig(tenants=(TenantClass(name="a", **limits),))).of("a", 0.0)


def test_a_minutes_allowance_may_be_used_at_once_and_then_comes_back_evenly():
    tenant = use(requests_per_minute=60)
    assert [tenant.enter(0.0) for _ in range(60)] == [None] * 60
    refusal = tenant.enter(0.0)
    assert (refusal.limit, refusal.retry_s) == ("requestsPerMinute", pytest.approx(1.0))
    assert "tenant 'a' has reached its limit of 60 requests per minute; send the request again in 1 s" in (
        refusal.sentence
    )
    assert tenant.enter(0.9) is not None
    assert tenant.enter(1.01) is None


@given(st.lists(st.floats(0, 20), min_size=1, max_size=200), st.integers(1, 100))
def test_no_more_requests_than_allowed_whenever_they_come_and_the_wait_told_is_enough(gaps, per_minute):
    tenant, now, accepted = use(requests_per_minute=per_minute), 0.0, []
    for gap in gaps:
        now += gap
        refusal = tenant.enter(now)
        if refusal is None:
            accepted.append(now)
            continue
        now += refusal.retry_s + 1e-6
        assert tenant.enter(now) is None
        accepted.append(now)
    for first, began in enumerate(accepted):
        for last, ended in enumerate(accepted[first:], start=first):
            most = per_minute + (ended - began) * per_minute / A_MINUTE + 1e-3
            assert last - first + 1 <= most + 1


def test_tokens_are_taken_at_the_beginning_and_given_back_at_the_end():
    tenant = use(tokens_per_minute=600)
    assert tenant.enter(0.0, tokens=1000) is None  # 400 are owed now
    refusal = tenant.enter(0.0)
    assert (refusal.limit, refusal.retry_s) == ("tokensPerMinute", pytest.approx(40.1))
    tenant.spend(-900, 1.0)  # it used 100
    assert tenant.enter(1.0) is None


def test_requests_in_progress_are_limited():
    tenant = use(concurrency=2)
    assert [tenant.enter(0.0), tenant.enter(0.0)] == [None, None]
    refusal = tenant.enter(0.0)
    assert refusal.limit == "concurrency"
    assert refusal.sentence.endswith("or ask for fewer texts at once")  # `n` above the limit never fits
    tenant.leave()
    assert tenant.enter(0.0) is None


def test_a_refused_request_counts_for_nothing():
    tenant = use(requests_per_minute=60, concurrency=1)
    tenant.enter(0.0)
    for _ in range(100):
        assert tenant.enter(0.0) is not None
    tenant.leave()
    assert tenant.requests.level == 59


def test_a_clock_that_stands_or_jumps_back_gives_nothing():
    tenant = use(requests_per_minute=1)
    assert tenant.enter(100.0) is None
    assert tenant.enter(100.0) is not None
    assert tenant.enter(50.0) is not None


def test_tenants_without_a_class_have_the_default_each_on_its_own():
    uses = Directory(parse('{"tenants": [{"name": "a"}], "defaultTenant": {"concurrency": 1}}'))
    assert uses.of("b", 0.0).enter(0.0) is None
    assert uses.of("b", 0.0).enter(0.0).limit == "concurrency"
    assert uses.of("c", 0.0).enter(0.0) is None
    assert [uses.of("a", 0.0).enter(0.0) for _ in range(9)] == [None] * 9
    assert [uses.of(name, 0.0).label for name in "abc"] == ["a", OTHER, OTHER]


def test_the_memory_of_tenants_is_bounded_and_keeps_those_that_use_something():
    uses = Directory(parse('{"defaultTenant": {"requestsPerMinute": 1}}'))
    uses.of("runs", 0.0).enter(0.0)
    for number in range(KNOWN_MOST + 500):
        uses.of(str(number), 0.0).enter(0.0)
        uses.of(str(number), 0.0).leave()
        if number % 1000 == 0:
            uses.of("runs", 0.0)
    assert len(uses) <= KNOWN_MOST
    assert uses.of("runs", 0.0).in_flight == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "tenants are malformed"),
        ('{"default": {"weight": 1}}', "a JSON object with tenants and defaultTenant"),
        ('{"tenants": [{"name": "a", "wieght": 1}]}', "wieght"),
        ('{"tenants": [{"weight": 1}]}', "give each tenant one name"),
        ('{"tenants": [{"name": "a"}, {"name": "a"}]}', "tenant 'a' occurs 2 times"),
        ('{"tenants": [{"name": "a", "weight": 0}]}', "weight of tenant 'a' is 0; use 1 to 1000"),
        ('{"defaultTenant": {"priority": 10}}', "priority of tenant 'defaultTenant' is 10; use 0 to 9"),
        ('{"defaultTenant": {"requestsPerMinute": -1}}', "requestsPerMinute of tenant 'defaultTenant' is -1"),
    ],
)
def test_a_wrong_configuration_is_refused_with_a_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(text)


def test_too_many_tenants_are_refused():
    many = ", ".join(f'{{"name": "{number}"}}' for number in range(101))
    with pytest.raises(ValueError, match="there are 101 tenants; configure at most 100"):
        parse(f'{{"tenants": [{many}]}}')
