"""Fair shares of tenants: the rules alone, then a scheduler whose machine takes the time that it expects."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.slots import SPARE, Slots
from moe_worker.scheduler.budget import RECENT, StepTime
from moe_worker.scheduler.plan import Limits
from moe_worker.scheduler.tenants import IDLE_MOST, TURN_S, Tenant, Tenants, shares_of, step_tokens
from tests.worker.simulated import SimulatedEngine

CPU = StepTime(fixed=0.003, per_token=0.0012, count=100)
"""Each token costs much."""
GPU = StepTime(fixed=0.005, per_token=0.00001, count=100)
"""A step costs about the same for one token and for a hundred."""


class Concave:
    """Tokens share what a step reads, as on two cores: 12 ms for one token, 28 ms for 16, 46 ms for 42."""

    def estimate(self, tokens):
        return 0.009 + 0.003 * tokens**0.67


TENANTS = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 40), st.booleans()), min_size=1, max_size=6)


def demands_of(rows):
    """Tenants (weight, tokens that it could compute, whether it has just arrived)."""
    return {
        Tenant(str(number), weight, ahead_until=1.0 if arriving else 0.0): tokens
        for number, (weight, tokens, arriving) in enumerate(rows)
    }


# The rules


@given(TENANTS, st.sampled_from([CPU, GPU]))
def test_a_step_slows_no_tenant_down_by_more_than_its_share(rows, time):
    demands = demands_of(rows)
    took_s = time.estimate(int(step_tokens(demands, time)))
    weight = sum(tenant.weight for tenant in demands)
    for tenant, tokens in demands.items():
        assert took_s <= weight / tenant.weight * time.estimate(tokens) + 1e-9


@given(TENANTS, st.floats(0.0, 1e-3))
def test_a_step_holds_what_the_smallest_demand_is(rows, per_token):
    # Steps of all sizes took 10 ms: a token costs next to nothing, which rounds to no token at all.
    demands = demands_of(rows)
    tokens = step_tokens(demands, StepTime(fixed=0.01, per_token=per_token, count=100))
    assert tokens >= min(demands.values())


@given(TENANTS, st.sampled_from([CPU, GPU]))
def test_a_step_gives_everything_away_and_nobody_more_than_it_can_use(rows, time):
    demands = demands_of(rows)
    tokens = step_tokens(demands, time)
    shares = shares_of(tokens, demands)
    assert all(0 <= shares[tenant] <= most for tenant, most in demands.items())
    given_, wanted = sum(shares.values()), sum(demands.values())
    assert min(tokens, wanted) - len(demands) <= given_ <= tokens + len(demands)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(3, 50))
def test_tenants_that_can_use_everything_get_tokens_by_weight(weights, tokens):
    """Within two tokens of the exact share, after any number of steps."""
    tenants = [Tenant(str(number), weight) for number, weight in enumerate(weights)]
    got = dict.fromkeys(tenants, 0)
    for step in range(1, 60):
        for tenant, share in shares_of(float(tokens), dict.fromkeys(tenants, 10**6)).items():
            got[tenant] += share
        for tenant in tenants:
            assert abs(got[tenant] - step * tokens * tenant.weight / sum(weights)) <= 2


def test_the_tokens_of_others_are_free_where_a_step_costs_no_more_for_them():
    one, many = Tenant("one"), Tenant("many")
    assert step_tokens({one: 1, many: 255}, GPU) > 256
    assert step_tokens({one: 1, many: 255}, CPU) == pytest.approx(4.5)


def test_who_arrives_has_the_step_nearly_alone_until_it_has_borrowed_its_turn():
    tenants = Tenants()
    old = tenants.join("old", 1)
    old.served = 100.0
    new = tenants.join("new", 1)
    assert (new.served, new.arriving, old.arriving) == (100.0, True, False)
    assert step_tokens({new: 10, old: 16}, CPU) < 14
    new.served += TURN_S
    assert not new.arriving
    assert step_tokens({new: 10, old: 16}, CPU) == pytest.approx(22.5)


@given(st.floats(0, 0.2), st.integers(1, 50))
def test_coming_and_going_earns_no_service(used_s, times):
    """However often a tenant comes back, it borrows no more than TURN_S, and idleness gives it no credit."""
    tenants = Tenants()
    other = tenants.join("other", 1)
    borrowed = 0.0
    for _ in range(times):
        tenant = tenants.join("comes and goes", 1)
        assert tenant.served >= other.served
        if tenant.arriving:
            borrowed = max(borrowed, tenant.served + used_s - other.served)
            tenant.served += used_s
        tenants.leave(tenant)
    assert borrowed <= TURN_S + used_s


def test_a_higher_priority_borrows_more_and_gains_no_service():
    tenants = Tenants()
    tenants.join("other", 1)
    tenant = tenants.join("urgent", 1, priority=3)
    assert tenant.ahead_until == pytest.approx(4 * TURN_S)
    assert tenant.served == 0.0


def test_the_counts_of_idle_tenants_are_bounded():
    tenants = Tenants()
    for number in range(3 * IDLE_MOST):
        tenants.leave(tenants.join(str(number), 1))
    assert len(tenants._idle) == IDLE_MOST
    assert not tenants.live


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=300), st.integers(1, 60))
def test_a_place_is_left_for_a_tenant_that_has_none(events, most):
    slots, taken = Slots(), []
    for number, (tenant, takes) in enumerate(events):
        if takes and slots.has_room(tenant, most):
            slots.take(number, tenant)
            taken.append(number)
        elif not takes and taken:
            slots.free(taken.pop())
        assert len(slots) <= most
        if most - len(slots) >= 1:
            assert slots.has_room("new", most)
    assert slots.of("a") + slots.of("b") + slots.of("c") == len(slots) == len(taken)


def test_a_lone_tenant_gets_seven_eighths_of_the_places_and_two_share_them():
    slots = Slots()
    for number in range(800):
        if slots.has_room("a", 800):
            slots.take(number, "a")
    assert slots.of("a") == pytest.approx(800 * SPARE / (SPARE + 1), abs=1)
    for number in range(800, 1600):
        if slots.has_room("b", 800):
            slots.take(number, "b")
    assert slots.of("b") == pytest.approx(87, abs=1)  # 7/8 of what the first one left


# The scheduler


class Machine(SimulatedEngine):
    """Steps take the time of `cost`. latency: of requests, from submission to their last token."""

    def __init__(self, cost, **limits):
        choices = {"sequences": 16, "waiting": 1000, "pages": 4000, "page_size": 4, "prefill_tokens": 256}
        super().__init__(Limits(**(choices | {"least_tokens": 16} | limits)))
        self.cost, self.began, self.latency, self.sampled = cost, {}, {}, {}

    def submit(self, number, prompt, new_tokens, **more):
        self.began[number] = self.now
        super().submit(number, prompt, new_tokens, **more)

    def take(self):
        plan = self.plan()
        self.now += self.cost.estimate(plan.step.tokens) if plan.step else 0.001
        for chunk in plan.step.chunks if plan.step else ():
            tenant = self.arrivals[chunk.id].tenant
            self.sampled[tenant] = self.sampled.get(tenant, 0) + chunk.samples
        for number in self.complete() if plan.step else ():
            self.latency[number] = self.now - self.began[number]
        return plan

    def flood(self, count, tenant="crowd", new_tokens=200, **more):
        chance = random.Random(1)
        for number in range(count):
            self.submit(number, chance.choices(range(3), k=12), new_tokens, tenant=tenant, **more)
        for _ in range(30):  # the machine is known now
            self.take()

    def ask(self, number, new_tokens=2, tenant="guest", length=10, **more):
        self.submit(
            number, random.Random(number).choices(range(3), k=length), new_tokens, tenant=tenant, **more
        )
        while number not in self.ended:
            self.take()
        return self.latency[number]


def alone_s(cost, **question):
    machine = Machine(cost)
    machine.flood(1, new_tokens=20)
    machine.drain()
    return machine.ask(10_000, **question)


@pytest.mark.parametrize("cost", [CPU, GPU], ids=["cpu", "gpu"])
def test_short_requests_next_to_560_streams_take_twice_their_time_alone_plus_a_step(cost):
    machine = Machine(cost)
    machine.flood(560)
    longest_step_s = cost.estimate(16)
    for number in range(1000, 1020):
        assert machine.ask(number) <= 1.3 * alone_s(cost) + longest_step_s
    assert machine.scheduler.counters.preemptions == 0


def test_a_request_is_alone_in_steps_smaller_than_all_measured_ones():
    """Measured steps of 16 tokens and more say too much of small ones, where time is concave in tokens."""
    machine = Machine(Concave())
    machine.flood(560, new_tokens=400)
    took_s = []
    for number in range(1000, 1020):
        for _ in range(4):  # the crowd's steps meanwhile
            machine.take()
        took_s.append(machine.ask(number, length=26))
    assert statistics.median(took_s) <= 1.25 * alone_s(Concave(), length=26)


def test_a_machine_that_computes_others_for_nothing_pauses_them_for_five_steps_to_find_out():
    machine = Machine(GPU, target_s=1.0)
    machine.flood(12, new_tokens=1000)
    for _ in range(200):
        machine.take()
    machine.submit(1000, [1, 2], 100, tenant="guest")
    assert [len(machine.take().step.chunks) for _ in range(RECENT)] == [*[1] * 5, *[13] * (RECENT - 5)]


@pytest.mark.parametrize("length", [2, 60])
def test_two_tenants_from_the_first_step_on_find_out_that_tokens_cost_nothing(length):
    """Steps of one size had kept 59 of 60 requests waiting for as long as the other tenant had a stream."""
    machine = Machine(GPU, sequences=64)
    for number in range(60):
        machine.submit(number, random.Random(number).choices(range(3), k=length), 90, tenant="crowd")
    machine.submit(1000, [1, 2], 90, tenant="guest")
    for _ in range(80):
        machine.take()
    assert [len(machine.take().step.chunks) for _ in range(5)] == [61] * 5


def test_two_tenants_from_the_first_step_on_find_out_that_tokens_cost_much():
    machine = Machine(CPU, sequences=64)
    for number in range(60):
        machine.submit(number, [1, number % 3], 200, tenant="crowd")
    machine.submit(1000, [1, 2], 200, tenant="guest")
    sizes = [len(machine.take().step.chunks) for _ in range(120)]
    assert max(sizes) <= 8
    assert statistics.mean(sizes[20:]) == pytest.approx(CPU.within(2 * CPU.estimate(1)), abs=1)


def test_tenants_that_arrive_together_pause_others_no_longer_than_one_does():
    """Each asks for less than the smallest step, which has the tokens of both."""
    machine = Machine(GPU, target_s=1.0)
    machine.flood(12, new_tokens=1000)
    for _ in range(200):
        machine.take()
    for number, tenant in ((1000, "guest"), (1001, "visitor")):
        machine.submit(number, [1, 2], 100, tenant=tenant)
    assert [len(machine.take().step.chunks) for _ in range(RECENT)] == [*[2] * 6, *[14] * (RECENT - 6)]


def test_without_tenants_the_same_requests_wait_for_hundreds_of_streams():
    machine = Machine(CPU)
    machine.flood(100, tenant="", new_tokens=60)
    assert machine.ask(1000, tenant="") > 50 * alone_s(CPU)


def test_a_long_stream_next_to_a_crowd_runs_at_half_its_speed():
    machine = Machine(CPU)
    machine.flood(560)
    assert machine.ask(1000, new_tokens=200) == pytest.approx(2 * alone_s(CPU, new_tokens=200), rel=0.15)


def test_a_machine_that_computes_others_for_nothing_pauses_nobody():
    machine = Machine(GPU, target_s=1.0)
    machine.flood(12)
    machine.submit(1000, [1, 2], 100, tenant="guest")
    for _ in range(20):
        machine.take()
    assert all(len(machine.take().step.chunks) == 13 for _ in range(50))


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (5, 1)])
def test_two_crowds_get_tokens_by_weight(weights):
    machine = Machine(CPU)
    for number in range(400):
        tenant = number % 2
        machine.submit(number, [1, number % 3], 20, tenant=f"t{tenant}", weight=weights[tenant])
    for _ in range(300):
        machine.take()
    share = machine.sampled["t0"] / (machine.sampled["t0"] + machine.sampled["t1"])
    assert share == pytest.approx(weights[0] / sum(weights), rel=0.1)


def test_streams_of_a_crowd_take_turns_while_some_of_them_pause():
    machine = Machine(CPU)
    machine.flood(16, new_tokens=400)
    machine.submit(1000, [1, 2], 150, tenant="guest")
    before = {number: len(machine.outputs[number]) for number in range(16)}
    while 1000 not in machine.ended:
        machine.take()
    made = [len(machine.outputs[number]) - before[number] for number in range(16)]
    assert min(made) > 0.7 * max(made)


def test_a_request_of_another_tenant_starts_though_the_batch_is_full_and_takes_pages_within_its_share():
    machine = Machine(CPU, sequences=4, pages=40)
    for number in range(8):
        machine.submit(number, random.Random(number).choices(range(3), k=30), 20, tenant="crowd")
    for _ in range(4):
        machine.take()
    machine.submit(1000, [0, 1, 2, 0] * 6, 4, tenant="guest")
    order = []
    while 1000 not in machine.ended:
        order += machine.take().preempted
    assert order
    assert all(number < 1000 for number in order)
    machine.drain()
    machine.check_pages()


def test_a_large_request_is_not_overtaken_for_ever_by_another_tenants_small_ones():
    machine = Machine(GPU, sequences=4, pages=40)
    number = 0
    for _ in range(3):
        machine.submit(number, [1] * 20, 20, tenant="small")
        number += 1
    machine.take()
    machine.submit(9999, [2] * 150, 2, tenant="large")
    while 9999 not in machine.ended:
        if machine.scheduler.waiting < 3:
            machine.submit(number, [number % 3] * 20, 20, tenant="small")
            number += 1
        machine.take()
        assert machine.scheduler.counters.steps < 3000
    machine.drain()
