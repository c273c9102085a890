"""Continuous batching, after any interleaving of arrivals, steps, ends and cancels."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_worker.errors import QueueFullError
from moe_worker.scheduler.batching import Limits, Phase, Placed, Scheduler


def scheduler(slots=2, waiting=10, prefill_tokens=100):
    return Scheduler(Limits(slots, waiting, prefill_tokens))


def test_waiting_requests_start_in_order_as_slots_come_free():
    plan = scheduler()
    for request in (1, 2, 3):
        plan.submit(request, prompt_tokens=10)
    assert plan.plan().sequences == (Placed(1, 0), Placed(2, 1))
    assert plan.plan().phase is Phase.DECODE
    plan.release(1)
    step = plan.plan()
    assert (step.phase, step.sequences) == (Phase.PREFILL, (Placed(3, 0),))
    assert plan.plan().sequences == (Placed(3, 0), Placed(2, 1))


def test_prompts_of_one_step_stay_within_the_token_budget():
    plan = scheduler(slots=4)
    for request, tokens in enumerate((60, 50, 40, 300)):
        plan.submit(request, tokens)
    batches = []
    while (step := plan.plan()).phase is Phase.PREFILL:
        batches.append([placed.request for placed in step.sequences])
    assert batches == [[0], [1, 2], [3]]


def test_a_full_queue_refuses_and_says_when_to_try_again():
    plan = scheduler(slots=1, waiting=1)
    plan.submit(1, 5)
    plan.submit(2, 5)
    with pytest.raises(QueueFullError, match="full") as error:
        plan.submit(3, 5)
    assert error.value.retryable
    assert error.value.retry_after_s > 0


def test_a_cancelled_request_in_the_queue_never_starts():
    plan = scheduler(slots=1)
    plan.submit(1, 5)
    plan.submit(2, 5)
    plan.release(1)
    assert plan.plan().sequences == (Placed(2, 0),)


class Interleaving(RuleBasedStateMachine):
    """Compares the scheduler with a list of live requests."""

    @initialize(slots=st.integers(1, 4), waiting=st.integers(0, 4), budget=st.integers(1, 20))
    def start(self, slots, waiting, budget):
        self.slots, self.capacity = slots, slots + waiting
        self.plan = Scheduler(Limits(slots, waiting, budget))
        self.live, self.placed, self.next = [], {}, 0

    @rule(tokens=st.integers(1, 30))
    def submit(self, tokens):
        if len(self.live) >= self.capacity:
            with pytest.raises(QueueFullError):
                self.plan.submit(self.next, tokens)
            return
        self.plan.submit(self.next, tokens)
        self.live.append(self.next)
        self.next += 1

    @rule()
    def step(self):
        step = self.plan.plan()
        if step is None:
            assert not self.live
            return
        slots = [placed.slot for placed in step.sequences]
        assert slots == sorted(set(slots))
        assert all(0 <= slot < self.slots for slot in slots)
        if step.phase is Phase.PREFILL:
            waiting = [request for request in self.live if request not in self.placed]
            assert sorted(placed.request for placed in step.sequences) == waiting[: len(slots)]
            assert not set(slots) & set(self.placed.values())
            self.placed |= {placed.request: placed.slot for placed in step.sequences}
        else:
            assert {placed.request: placed.slot for placed in step.sequences} == self.placed

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        request = data.draw(st.sampled_from(self.live))
        self.plan.release(request)
        self.plan.release(request)
        self.live.remove(request)
        self.placed.pop(request, None)

    @invariant()
    def nothing_is_lost_or_counted_twice(self):
        if hasattr(self, "plan"):
            assert self.plan.running == len(self.placed) <= self.slots
            assert self.plan.waiting + self.plan.running == len(self.live)


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
