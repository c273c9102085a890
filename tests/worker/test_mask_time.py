"""Masks of one tenant's output formats delay others' steps no longer than allowed: a simulated machine."""

import statistics

import pytest

from moe_worker.scheduler.mask_time import SLACK
from moe_worker.scheduler.plan import Limits
from tests.worker.simulated import SimulatedEngine

STEP_S = 0.008
"""As of a GPU: a step costs the same for any number of tokens."""
TARGET_S = 0.05
SLACK_S = SLACK * TARGET_S


class Machine(SimulatedEngine):
    """masks: seconds of one mask, by tenant. flights: steps in flight. spent: time of masks, by step."""

    def __init__(self, masks, flights=1, **limits):
        self.masks, self.most, self.spent, self.streams = masks, flights, [], []
        self._steps = []
        choices = {"sequences": 64, "waiting": 1000, "pages": 4000, "page_size": 4, "prefill_tokens": 256}
        super().__init__(Limits(**(choices | {"target_s": TARGET_S, "ahead": flights > 1} | limits)))
        for first, count in ((-100, 30), (-50, 3)):  # steps of several sizes tell that a token costs nothing
            self.flood(count, "", new_tokens=9, first=first, guided=False)
            self.takes(15)

    def flood(self, count, tenant, new_tokens=400, first=0, guided=True, **more):
        for number in range(first, first + count):
            self.submit(number, [1, number % 3], new_tokens, tenant=tenant, guided=guided, **more)

    def take(self):
        plan = self.plan()
        if plan.step is not None:
            took = {}
            for chunk in plan.step.chunks:
                arrival = self.arrivals[chunk.id]
                if chunk.samples and arrival.guided:
                    took[chunk.id] = self.masks[arrival.tenant]
            self._steps.append(took)
            self.spent.append(sum(took.values()))
            self.streams.append(len(plan.step.chunks))
            self.now += STEP_S  # masks are computed meanwhile, so the scheduler's other rules do not see them
        if self._steps and (plan.step is None or len(self._steps) == self.most):
            self.scheduler.note_masks(self._steps.pop(0))
            self.complete()

    def takes(self, count):
        """Mean of the seconds that masks take in `count` steps."""
        del self.spent[:], self.streams[:]
        for _ in range(count):
            self.take()
        return statistics.mean(self.spent)


@pytest.fixture(params=[1, 2], ids=["one step", "a step ahead"])
def flights(request):
    return request.param


@pytest.mark.parametrize("mask_s", [0.001, 0.002, 0.02])
def test_slow_masks_of_a_tenant_add_no_more_than_the_slack_to_others_steps(flights, mask_s):
    machine = Machine({"hostile": mask_s}, flights)
    machine.flood(32, "hostile", new_tokens=300)
    machine.takes(10)
    assert machine.takes(5) == pytest.approx(32 * mask_s)  # nobody else is there
    machine.flood(1, "guest", first=100, new_tokens=240, guided=False)
    machine.takes(30)
    before = {number: len(machine.outputs[number]) for number in [*range(32), 100]}
    assert machine.takes(200) <= 1.05 * SLACK_S
    made = [len(machine.outputs[number]) - made for number, made in before.items()]
    assert made[-1] >= 199  # a token in every step
    assert min(made[:-1]) >= int(0.8 * 200 * SLACK_S / mask_s / 32)  # and the others take turns
    machine.drain()


def test_short_texts_with_slow_masks_add_no_more_either(flights):
    machine = Machine({"hostile": 0.002}, flights)
    machine.flood(1, "guest", first=9999, new_tokens=900, guided=False)
    for number in range(0, 3000, 10):
        if machine.scheduler.waiting < 20:
            machine.flood(10, "hostile", new_tokens=1, first=number)
        machine.take()
    assert statistics.mean(machine.spent) <= 1.1 * SLACK_S


def test_a_tenant_alone_and_two_with_equal_masks_pause_nobody(flights):
    machine = Machine({"one": 0.002, "two": 0.002}, flights)
    machine.flood(20, "one")
    machine.takes(20)
    machine.takes(20)
    assert set(machine.streams) == {20}
    machine.flood(20, "two", first=100)
    machine.takes(40)
    machine.takes(50)
    assert set(machine.streams) == {40}


def test_usual_masks_pause_nobody(flights):
    streams = {}
    for guided in (True, False):
        machine = Machine({"schemas": 0.00005}, flights)
        machine.flood(60, "schemas", guided=guided)
        machine.flood(1, "guest", first=100, guided=False)
        machine.takes(90)
        streams[guided] = machine.streams
    assert streams[True][3:] == streams[False][3:]  # the time of the first masks was not known


def test_slow_masks_by_weight(flights):
    """Two hostile tenants and a guest: the slack is divided by weight."""
    machine = Machine({"light": 0.002, "heavy": 0.002}, flights)
    machine.flood(16, "light", weight=1)
    machine.flood(16, "heavy", first=50, weight=3)
    machine.flood(1, "guest", first=100, guided=False)
    machine.takes(30)
    before = {number: len(machine.outputs[number]) for number in machine.outputs}
    assert machine.takes(200) <= 1.1 * SLACK_S
    made = {number: len(machine.outputs[number]) - before[number] for number in before}
    light, heavy = (sum(made[number] for number in range(first, first + 16)) for first in (0, 50))
    assert heavy / light == pytest.approx(3, rel=0.15)


def test_a_guest_that_can_compute_nothing_keeps_nobody_from_going_on():
    """It lacks pages, which only the paused streams would free."""
    machine = Machine({"hostile": 0.02}, pages=56)
    machine.flood(3, "hostile", new_tokens=24)
    machine.takes(10)
    machine.submit(100, [1] * 190, 20, tenant="guest")
    machine.takes(400)
    assert set(machine.ended) >= {0, 1, 2}
    machine.drain()
