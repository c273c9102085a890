"""Start-time fair queueing: the bound of its paper, and what its users rely on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_frontend.policy.fair import IDLE_MOST, FairQueue

COSTS = st.lists(st.integers(1, 100), min_size=1, max_size=60)
WEIGHT = st.integers(1, 10)


@given(COSTS, COSTS, WEIGHT, WEIGHT)
def test_service_of_two_backlogged_tenants_differs_by_less_than_the_papers_bound(costs, others, one, other):
    """|W_f / r_f - W_m / r_m| <= l_f / r_f + l_m / r_m, in every interval (theorem 1 of the paper)."""
    queue = FairQueue()
    for cost in costs:
        queue.push("f", cost, one, cost)
    for cost in others:
        queue.push("m", cost, other, cost)
    bound = max(costs) / one + max(others) / other
    served = {"f": 0, "m": 0}
    differences = [0.0]
    while queue.of("f") and queue.of("m"):
        tenant, cost = queue.pop()
        served[tenant] += cost
        differences.append(served["f"] / one - served["m"] / other)
    assert max(differences) - min(differences) <= bound + 1e-9


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50), WEIGHT), max_size=80))
def test_everything_comes_out_once_and_each_tenants_items_in_their_order(pushes):
    queue = FairQueue()
    for number, (tenant, cost, weight) in enumerate(pushes):
        queue.push(tenant, number, weight, cost)
    assert len(queue) == len(pushes) == sum(count for _, count in queue.tenants())
    out = {}
    while (taken := queue.pop()) is not None:
        out.setdefault(taken[0], []).append(taken[1])
    assert out == {
        tenant: [number for number, push in enumerate(pushes) if push[0] == tenant]
        for tenant in {push[0] for push in pushes}
    }


@given(st.integers(1, 500), st.integers(0, 500))
def test_a_newcomer_waits_for_one_item_of_each_other_tenant_at_most(backlog, served):
    queue = FairQueue()
    for number in range(backlog + served):
        queue.push("crowd", number)
    for _ in range(served):
        queue.pop()
    queue.push("guest", "question")
    assert "guest" in [queue.pop()[0], queue.pop()[0]]


def test_idleness_earns_nothing():
    queue = FairQueue()
    for number in range(200):
        queue.push("busy", number)
        queue.push("returns", number)
    for _ in range(400):
        queue.pop()
    for number in range(100):  # the other one is idle for so long
        queue.push("busy", number)
        queue.pop()
    for number in range(20):
        queue.push("busy", number)
        queue.push("returns", number)
    first = [queue.pop()[0] for _ in range(20)]
    assert first.count("returns") == pytest.approx(10, abs=1)


def test_a_tenant_that_has_no_room_is_passed_over():
    queue = FairQueue()
    queue.push("a", 1)
    queue.push("b", 2)
    assert queue.pop(lambda tenant: tenant != "a") == ("b", 2)
    assert queue.pop(lambda tenant: tenant != "a") is None
    assert queue.pop() == ("a", 1)
    assert queue.pop() is None


def test_an_item_that_gives_up_is_taken_out():
    queue = FairQueue()
    items = [object() for _ in range(3)]
    for item in items:
        queue.push("a", item)
    assert queue.newest("a") is items[2]
    assert queue.remove("a", items[1])
    assert not queue.remove("a", items[1])
    assert not queue.remove("nobody", items[1])
    assert [queue.pop()[1], queue.pop()[1]] == [items[0], items[2]]


def test_what_is_remembered_of_idle_tenants_is_bounded():
    queue = FairQueue()
    for number in range(3 * IDLE_MOST):
        queue.push(str(number), number)
        queue.pop()
    assert len(queue._idle) == IDLE_MOST
