"""Pages that the cache evicts go to CPU memory and come back: the same tokens, computed once."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Request
from moe_worker.errors import SettingsError
from moe_worker.kvcache.host import HostPages, pinned_slots
from moe_worker.kvcache.offload import Move
from moe_worker.kvcache.paged import FP8, CacheShape, PagedCache
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.scheduler.plan import Block, Limits
from tests.worker.simulated import SimulatedEngine

PER_PAGE = 16 * 3 * 24 * 4  # bytes of a page of the tiny model
PROMPTS = [[7 + (i * step) % 200 for i in range(150)] for step in (1, 3, 5)]


def core(checkpoint, **changes):
    settings = EngineOptions(
        device="cpu", dtype="float32", context_length=256, threads=1, kv_memory=17 * PER_PAGE, **changes
    )
    made = EngineCore(load(checkpoint, settings, progress=False), settings)
    if made._host is not None:
        made._host.page_s = 0.0  # so that what the test sees does not depend on this machine
    return made


def tokens(engine, number, prompt, salt=""):
    sampling = SamplingParameters(max_tokens=12, temperature=1.0, seed=3)
    engine.submit(Request(number, tuple(prompt), sampling, seed=3, salt=salt))
    found = []
    while not engine.idle:
        found += [delta.token for delta in engine.step()]
    return found


def test_a_prompt_that_was_evicted_comes_back_with_the_same_tokens(endless):
    plain, kept = core(endless), core(endless, kv_offload=100 * PER_PAGE)
    for number, prompt in enumerate(PROMPTS * 2):
        assert tokens(kept, number, prompt) == tokens(plain, number, prompt)
    # 150 tokens are 9 whole pages; the cache holds 17, so each prompt evicts the one before.
    assert plain.statistics.prefix_hit_tokens == 0
    assert kept.statistics.prefix_hit_tokens == 3 * 144
    assert kept.statistics.restored >= 3 * 7
    assert kept.statistics.offloaded >= kept.statistics.restored
    assert plain.statistics.offloaded == plain.statistics.restored == 0


def test_a_preempted_request_gets_its_pages_back(endless):
    sampling = SamplingParameters(max_tokens=90)
    results = []
    for changes in ({}, {"kv_offload": 100 * PER_PAGE}):
        engine = core(endless, **changes)
        for number, prompt in enumerate(PROMPTS):
            engine.submit(Request(number, tuple(prompt[:60]), sampling, seed=0))
        found = {number: [] for number in range(3)}
        while not engine.idle:
            for delta in engine.step():
                found[delta.id].append(delta.token)
        assert engine.counters.preemptions > 0
        results.append((found, engine.statistics))
    assert results[0][0] == results[1][0]
    assert results[1][1].restored > 0
    assert results[1][1].prefill_tokens < results[0][1].prefill_tokens


def test_tenants_share_no_pages_in_cpu_memory(endless):
    engine = core(endless, kv_offload=100 * PER_PAGE)
    tokens(engine, 0, PROMPTS[0], "a")
    tokens(engine, 1, PROMPTS[1], "a")
    tokens(engine, 2, PROMPTS[0], "b")
    assert engine.statistics.prefix_hit_tokens == 0
    tokens(engine, 3, PROMPTS[0], "a")
    assert engine.statistics.prefix_hit_tokens == 144


def test_a_damaged_page_is_computed_again(endless):
    engine, plain = core(endless, kv_offload=100 * PER_PAGE), core(endless)
    expected = tokens(plain, 0, PROMPTS[0])
    tokens(engine, 0, PROMPTS[0])
    tokens(engine, 1, PROMPTS[1])
    for slot in engine._host._slots:
        slot[5] ^= 64
    assert tokens(engine, 2, PROMPTS[0]) == expected
    assert engine.statistics.restored == 0


def test_pages_do_not_come_back_where_computing_them_is_faster(endless):
    engine = core(endless, kv_offload=100 * PER_PAGE)
    engine._host.page_s = 1e6
    for number, prompt in enumerate(PROMPTS * 2):
        tokens(engine, number, prompt)
    assert engine.statistics.offloaded > 0
    assert engine.statistics.restored == 0


def test_settings_that_make_no_sense_are_refused(endless):
    with pytest.raises(SettingsError, match=r"one page takes 4608; give more, or 0"):
        core(endless, kv_offload=1000)
    for changes in ({"mesh": "1x2"}, {"prefix_cache": False}):
        with pytest.raises(SettingsError, match="kv_offload is 5000; it keeps pages of the prefix cache"):
            EngineOptions(kv_offload=5000, **changes)


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 24))
def test_pinned_memory_is_no_more_than_was_asked_for(memory, page):
    """torch pins a power of two of bytes for each tensor."""
    counts = pinned_slots(memory, page)
    assert sum(1 << (count * page - 1).bit_length() for count in counts) <= memory
    assert all(counts)
    assert sum(counts) * page > memory - (len(counts) + 2) * page


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("width", [3, 24])
def test_pages_are_copied_bit_by_bit(dtype, width):
    cache = PagedCache.allocate(CacheShape(2, width, 4, dtype), 5, torch.device("cpu"))
    cache.storage_LRN.copy_(torch.randint(0, 256, cache.storage_LRN.shape, dtype=torch.uint8))
    before = cache.storage_LRN.clone()
    host = HostPages(cache, 3 * 2 * 4 * width * 4)
    host.run([Move(0, 1, True), Move(1, 3, True), Move(0, 3, False), Move(1, 1, False)])
    assert host.ready(0)
    assert host.intact(1)
    assert not host.ready(2)
    after = cache.storage_LRN
    assert torch.equal(after[:, 12:16], before[:, 4:8])
    assert torch.equal(after[:, 4:8], before[:, 12:16])
    assert torch.equal(after[:, 16:20], before[:, 16:20])
    assert host.page_s > 0


def test_checksums_are_bounded_in_each_step():
    """A prompt that evicts many pages at once must not make one step long."""
    cache = PagedCache.allocate(CacheShape(1, 8, 4, torch.float32), 40, torch.device("cpu"))
    host = HostPages(cache, 40 * 8 * 4 * 4)
    assert 1 <= host.sums_most < 1_000_000
    host.sums_most = 3
    host.run([Move(slot, slot, True) for slot in range(8)])
    assert [slot for slot in range(8) if host.ready(slot)] == [0, 1, 2]
    host.run([Move(3, 9, True), Move(0, 9, True)])
    assert [slot for slot in range(8) if host.ready(slot)] == [1, 2, 4, 5, 6]
    host.run([])
    assert all(host.ready(slot) and host.intact(slot) for slot in range(8))


def run(slots, pages=4, **limits):
    return SimulatedEngine(Limits(sequences=1, waiting=9, pages=pages, page_size=2, **limits), slots)


def serve(engine, number, prompt, **more):
    engine.submit(number, prompt, 1, **more)
    while not engine.scheduler.idle:
        engine.step()


def test_the_least_recently_used_pages_leave_cpu_memory_first():
    engine = run(slots=4)
    texts = [[number % 3, number // 3] * 3 + [0] for number in range(4)]  # 3 whole pages each
    for number, text in enumerate(texts):
        serve(engine, number, text)
    restored = engine.scheduler.offloaded[1]
    serve(engine, 9, texts[0])
    assert engine.scheduler.offloaded[1] == restored
    serve(engine, 10, texts[3])
    assert engine.scheduler.offloaded[1] > restored


def test_blocks_in_cpu_memory_count_as_held_until_they_leave_it():
    engine = run(slots=3)
    serve(engine, 0, [0, 1, 2, 0, 1, 2, 0], blocks=[Block(7, 6)])
    serve(engine, 1, [1, 1, 1, 1, 1, 1, 1])
    assert engine.scheduler.take_block_changes() == ((7,), ())
    serve(engine, 2, [2, 1, 1, 1, 1, 1, 1])
    serve(engine, 3, [0, 0, 0, 0, 0, 0, 0])
    assert engine.scheduler.take_block_changes() == ((), (7,))


def test_more_cpu_memory_needs_fewer_tokens():
    computed = []
    texts = [[kind // 3, kind % 3, *[kind % 2] * 9] for kind in random.Random(1).choices(range(9), k=60)]
    for slots in (0, 12, 60):
        engine = run(slots, pages=8)
        for number, text in enumerate(texts):
            serve(engine, number, text)
        computed.append(engine.scheduler.counters.prompt_tokens - engine.scheduler.counters.prefix_hit_tokens)
    assert computed[0] > computed[1] > computed[2]


def returning(tokens):
    """An engine in whose CPU memory a prompt of 20 pages is; a step has so many prompt tokens."""
    engine = run(slots=60, pages=24, prefill_tokens=tokens, least_tokens=tokens)
    prompt = [number % 3 for number in range(41)]
    serve(engine, 0, prompt)
    serve(engine, 1, [2, *prompt[1:]])
    engine.scheduler.budget.time.per_token = 0.5
    return engine, prompt


def test_pages_come_back_in_several_steps_where_one_would_become_long():
    engine, prompt = returning(tokens=8)
    engine.storage.page_s = 0.5  # as long as one token, so 8 pages in a step
    engine.submit(2, prompt, 1)
    steps, restored = 0, [engine.scheduler.offloaded[1]]
    while not engine.scheduler.idle:
        engine.step()
        steps += 1
        restored.append(engine.scheduler.offloaded[1])
    counts = [after - before for before, after in pairwise(restored)]
    assert sum(counts) >= 16
    assert max(counts) == 8
    assert steps <= 4


def test_a_request_that_ends_while_its_pages_come_back_leaves_them_to_others():
    engine, prompt = returning(tokens=8)
    engine.storage.page_s = 0.5
    engine.submit(2, prompt, 1)
    engine.step()
    engine.cancel(2)
    offload = engine.scheduler._policy.memory.offload
    assert not any(entry.users for entry in offload._entries.values())
    serve(engine, 3, prompt)


def test_a_page_that_is_damaged_while_others_come_back_is_computed():
    engine, prompt = returning(tokens=8)
    engine.storage.page_s = 0.5
    engine.submit(2, prompt, 1)
    engine.step()
    for slot in range(60):
        engine.storage.lose(slot)
    before = engine.scheduler.offloaded[1]
    while not engine.scheduler.idle:
        engine.step()  # checks every row that is read
    assert engine.scheduler.offloaded[1] == before
