"""The scheduler after any interleaving of arrivals, steps, ends, cancels, deadlines and refused steps."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_worker.errors import QueueFullError, RequestError
from moe_worker.scheduler.plan import Block, Limits
from tests.worker.simulated import SimulatedEngine

LIMITS = st.builds(
    Limits,
    sequences=st.integers(1, 5),
    waiting=st.integers(0, 6),
    pages=st.integers(1, 14),
    page_size=st.sampled_from([1, 2, 4]),
    prefill_tokens=st.integers(1, 12),
    least_tokens=st.integers(1, 6),
    target_s=st.sampled_from([0.0, 0.01, 1.0]),
    aging_s=st.sampled_from([0.0, 1.0]),
    prefix_cache=st.sampled_from([True, True, True, False]),
    micro_batches=st.sampled_from([1, 1, 2, 3]),
    least_streams=st.sampled_from([1, 1, 3]),
    ahead=st.booleans(),
)
# Few tokens and few beginnings, so that prompts often share some of their pages.
PROMPTS = st.builds(
    lambda beginning, rest: beginning + rest,
    st.sampled_from([[], [0] * 4, [0] * 8, [0, 1] * 5]),
    st.lists(st.integers(0, 2), min_size=1, max_size=10),
)


class Interleaving(RuleBasedStateMachine):
    """The simulated device checks every step, and every text against the one computed alone."""

    @initialize(limits=LIMITS, tenants=st.sampled_from([1, 2, 4]), slots=st.sampled_from([0, 0, 1, 3, 20]))
    def start(self, limits, tenants, slots):
        self.tenants = tenants
        self.run = SimulatedEngine(limits, slots)
        self.next = 0
        self.names, self.told = {}, set()

    def _name(self, namespace, beginning):
        return self.names.setdefault((namespace, tuple(beginning)), len(self.names))

    @property
    def live(self):
        return [number for number in self.run.arrivals if number not in self.run.ended]

    @rule(
        prompt=PROMPTS,
        new_tokens=st.integers(1, 12),
        priority=st.integers(0, 9),
        patience=st.none() | st.floats(0, 1),
        namespace=st.sampled_from(["", "", "other"]),
        tenant=st.integers(0, 3),
        weight=st.sampled_from([1, 1, 5]),
        guided=st.booleans(),
    )
    def submit(self, prompt, new_tokens, priority, patience, namespace, tenant, weight, guided):
        limits, full = self.run.limits, len(self.live) >= self.run.limits.requests
        fits = len(prompt) + new_tokens - 1 <= limits.tokens
        deadline = None if patience is None else self.run.now + patience
        more = {"priority": priority, "deadline": deadline, "namespace": namespace}
        more |= {"tenant": str(min(tenant, self.tenants - 1)), "weight": weight, "guided": guided}
        more["blocks"] = [Block(self._name(namespace, prompt[:end]), end) for end in range(3, len(prompt), 3)]
        if fits and not full:
            self.run.submit(self.next, prompt, new_tokens, **more)
            self.next += 1
            return
        with pytest.raises(QueueFullError if fits else RequestError):
            self.run.submit(self.next, prompt, new_tokens, **more)

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.2]))
    def step(self, seconds):
        self.run.now += seconds
        while self.run.flights:
            self.run.complete()
        plan = self.run.plan()
        assert plan.step is not None or not self.live

    @precondition(lambda self: self.run.flights < 3)
    @rule()
    def plan_ahead(self):
        self.run.plan()

    @precondition(lambda self: self.run.flights)
    @rule()
    def complete(self):
        self.run.now += 0.01
        self.run.complete()

    @rule(seconds=st.sampled_from([0.0, 1e-5, 0.002, 10.0]), data=st.data())
    def masks_take_time(self, seconds, data):
        numbers = data.draw(st.lists(st.integers(0, self.next), max_size=4))
        self.run.scheduler.note_masks(dict.fromkeys(numbers, seconds))

    @rule()
    def the_device_refuses(self):
        self.run.plan_and_fail()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        number = data.draw(st.sampled_from(self.live))
        self.run.cancel(number)
        self.run.scheduler.release(number)

    @precondition(lambda self: self.run.storage is not None)
    @rule(slot=st.integers(0, 19))
    def memory_is_damaged(self, slot):
        if self.run.storage.ready(slot):
            self.run.storage.lose(slot)

    @invariant()
    def pages_are_accounted_for(self):
        if hasattr(self, "run"):
            self.run.check_pages()
            most = self.run.limits.sequences * (1 if self.tenants == 1 else 2)
            assert self.run.scheduler.running <= most
            assert self.run.scheduler.waiting + self.run.scheduler.running == len(self.live)

    @invariant()
    def told_blocks_are_cached_or_will_be(self):
        if not hasattr(self, "run"):
            return
        stored, evicted = self.run.scheduler.take_block_changes()
        assert not self.told & set(stored)
        assert self.told >= set(evicted)
        self.told = self.told - set(evicted) | set(stored)
        live = {block.name for number in self.live for block in self.run.arrivals[number].blocks}
        caches = self.run.limits.prefix_cache
        assert self.told >= (live if caches else set())
        tree, size = self.run.scheduler._policy.memory.tree, self.run.limits.page_size
        for (namespace, beginning), name in self.names.items():
            if name in self.told - live:
                assert self.run.storage is not None or _is_cached(tree, namespace, beginning, size)

    def teardown(self):
        if hasattr(self, "run"):
            self.run.drain()
            self.run.check_pages()
            assert not self.live
            assert self.run.scheduler.used_pages == 0
            several = self.tenants > 1 or self.run.limits.micro_batches > 1
            assert several or self.run.scheduler.counters.largest_gap <= 1


def _is_cached(tree, namespace, tokens, size):
    """Whether a path of the tree begins with these tokens."""
    nodes = [tree._roots[namespace]] if namespace in tree._roots else []
    for start in range(0, len(tokens), size):
        page = tuple(tokens[start : start + size])
        nodes = [child for node in nodes for key, child in node.children.items() if key[: len(page)] == page]
    return bool(nodes)


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_ten_thousand_requests_with_random_cancels_leave_nothing_behind():
    run = SimulatedEngine(
        Limits(sequences=32, waiting=64, pages=100, page_size=4, prefill_tokens=64, least_tokens=32)
    )
    chance = random.Random(1)
    beginnings = [chance.choices(range(3), k=12) for _ in range(20)]
    number = refused = 0
    while number < 10_000:
        run.now += 0.01
        for _ in range(chance.randrange(4)):
            text = chance.choice(beginnings) + chance.choices(range(3), k=chance.randint(1, 12))
            deadline = run.now + chance.random() if chance.random() < 0.05 else None
            try:
                run.submit(
                    number, text, chance.randint(1, 40), priority=chance.randrange(10), deadline=deadline
                )
            except QueueFullError:
                refused += 1
            number += 1
        for live in list(run.scheduler._live):
            if chance.random() < 0.005:
                run.cancel(live)
        run.plan()
        if run.flights > chance.randrange(3):
            run.complete()
    run.drain()
    run.check_pages()
    scheduler = run.scheduler
    assert len(run.ended) + refused == number
    assert set(run.ended.values()) == {"finished", "cancelled", "expired"}
    assert (scheduler.used_pages, scheduler.waiting, scheduler.running) == (0, 0, 0)
    assert min(scheduler.counters.preemptions, scheduler.evictions, refused) > 100
    assert scheduler.counters.largest_gap == 1
    assert scheduler.counters.prefix_hit_tokens > 0.2 * scheduler.counters.prompt_tokens
