"""Pages are never lost, never given twice, and freed exactly once."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_worker.kvcache.heap import SMALL, LazyHeap
from moe_worker.kvcache.pages import PagePool


def test_pages_are_taken_shared_and_freed_with_the_last_reference():
    pool = PagePool(3)
    (page,) = pool.take(1)
    assert pool.retain(page) == 2
    assert (pool.release(page), pool.free) == (1, 2)
    assert (pool.release(page), pool.free) == (0, 3)


def test_misuse_is_refused_with_a_sentence():
    pool = PagePool(2)
    with pytest.raises(ValueError, match="cannot take 3 pages: 2 of 2 are free"):
        pool.take(3)
    (page,) = pool.take(1)
    pool.release(page)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(page)
    with pytest.raises(ValueError, match="only a page in use"):
        pool.retain(page)
    assert pool.free == 2


class Pool(RuleBasedStateMachine):
    """Compares the pool with a list that holds each page once for each reference."""

    @initialize(pages=st.integers(0, 12))
    def start(self, pages):
        self.pool, self.held = PagePool(pages), []

    @rule(count=st.integers(0, 5))
    def take(self, count):
        if count > self.pool.free:
            with pytest.raises(ValueError, match="cannot take"):
                self.pool.take(count)
            return
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        assert not set(taken) & set(self.held)
        self.held += taken

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=st.booleans())
    def share_or_release(self, data, more):
        page = data.draw(st.sampled_from(self.held))
        if more:
            self.held.append(page)
            assert self.pool.retain(page) == self.held.count(page)
        else:
            self.held.remove(page)
            assert self.pool.release(page) == self.held.count(page)

    @invariant()
    def the_counts_agree(self):
        if hasattr(self, "pool"):
            assert self.pool.used == len(set(self.held)) == self.pool.pages - self.pool.free
            for page in range(self.pool.pages):
                assert self.pool.references(page) == self.held.count(page)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_heap_gives_the_least_first_and_equal_keys_in_order():
    heap = LazyHeap(lambda key, item: True)
    for key, item in [(2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")]:
        heap.push(key, item)
    assert heap.peek() == (1.0, "a")
    assert [heap.pop() for _ in range(5)] == ["a", "b", "c", "d", None]


def test_a_heap_skips_stale_entries_and_does_not_keep_them():
    fresh = set()
    heap = LazyHeap(lambda key, item: item in fresh)
    for number in range(100 * SMALL):
        fresh = {number}
        heap.push(float(-number), number)
        assert len(heap) <= SMALL + 1
    assert (heap.pop(), heap.pop()) == (100 * SMALL - 1, None)
