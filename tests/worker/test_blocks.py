"""Names of blocks: which of them the cache holds, as the scheduler tells it."""

from moe_api.prefixes import HELD_MOST
from moe_worker.kvcache.blocks import NAMED_MOST, BlockNames
from moe_worker.scheduler.plan import Block, Limits
from tests.worker.simulated import SimulatedEngine


def test_only_the_first_and_the_last_holder_are_told():
    names = BlockNames()
    assert names.retain(1)
    assert names.retain(1)
    assert names.take() == ((1,), ())
    names.release(1)
    assert names.take() == ((), ())
    names.release(1)
    assert names.take() == ((), (1,))
    assert len(names) == 0


def test_what_came_and_went_between_two_calls_is_not_told():
    names = BlockNames()
    names.retain(1)
    names.release(1)
    assert names.take() == ((), ())
    names.retain(1)
    names.take()
    names.release(1)
    names.retain(1)
    assert names.take() == ((), ())


def test_names_are_bounded_and_those_without_room_are_not_released_later():
    names = BlockNames(most=1)
    assert names.retain(1)
    assert not names.retain(2)
    assert names.retain(1)
    assert names.take() == ((1,), ())


def test_a_replica_names_no_more_blocks_than_frontends_keep():
    """The engine does not import moe_api, so the bound stands in both."""
    assert NAMED_MOST == HELD_MOST


def run(pages=8, page_size=2, **limits):
    return SimulatedEngine(Limits(sequences=2, waiting=2, pages=pages, page_size=page_size, **limits))


def blocks(*ends):
    return [Block(100 + end, end) for end in ends]


def drain(engine):
    while not engine.scheduler.idle:
        engine.step()


def test_blocks_are_told_when_a_request_comes_and_stay_while_their_pages_do():
    engine = run()
    engine.submit(0, [0, 1, 2, 0, 1], 2, blocks=blocks(2, 4))
    assert engine.scheduler.take_block_changes() == ((102, 104), ())
    drain(engine)
    assert engine.scheduler.take_block_changes() == ((), ())
    engine.submit(1, [2] * 14, 3, blocks=blocks(12))
    drain(engine)
    stored, evicted = engine.scheduler.take_block_changes()
    assert (stored, set(evicted)) == ((112,), {102, 104})


def test_a_cancelled_request_leaves_the_names_of_what_it_computed():
    engine = run(least_tokens=4, prefill_tokens=4)
    engine.submit(0, [0, 1, 2, 0, 1, 1, 2, 2], 2, blocks=blocks(4, 8))
    engine.step()
    engine.scheduler.release(0)
    assert engine.scheduler.take_block_changes() == ((104,), ())


def test_a_block_ends_within_a_page_of_each_text_that_goes_on_after_it():
    engine = run(pages=20, page_size=4)
    engine.submit(0, [0, 1, 2, 0, 1], 2, blocks=blocks(3))
    drain(engine)
    engine.submit(1, [0, 1, 2, 1, 1], 2, blocks=blocks(3))
    drain(engine)
    tree = engine.scheduler._policy.memory.tree
    assert engine.scheduler.take_block_changes() == ((103,), ())
    tree.evict(1)
    assert engine.scheduler.take_block_changes() == ((), ())
    tree.evict(tree.pages)
    assert engine.scheduler.take_block_changes() == ((), (103,))


def test_pages_that_came_before_anybody_asked_get_names_with_the_next_request():
    engine = run()
    engine.submit(0, [0, 1, 2, 0, 1], 1)
    drain(engine)
    assert engine.scheduler.take_block_changes() == ((), ())
    engine.submit(1, [0, 1, 2, 0, 2], 1, blocks=blocks(2, 4))
    drain(engine)
    assert engine.scheduler.take_block_changes() == ((102, 104), ())


def test_without_a_prefix_cache_nothing_is_told():
    engine = run(prefix_cache=False)
    engine.submit(0, [0, 1, 2], 1, blocks=blocks(2))
    drain(engine)
    assert engine.scheduler.take_block_changes() == ((), ())
