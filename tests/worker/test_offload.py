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
from moe_worker.kvcache.pinned import PinnedPages, frame_bytes
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.scheduler.budget import StepTime
from moe_worker.scheduler.plan import Block, Limits
from tests.worker.simulated import SimulatedEngine

PER_PAGE = 16 * 3 * 24 * 4  # bytes of a page of the tiny model
SAMPLING = SamplingParameters(max_tokens=12, temperature=1.0, seed=3)
PROMPTS = [[7 + (i * step) % 200 for i in range(150)] for step in (1, 3, 5)]


@pytest.fixture(params=[HostPages, PinnedPages])
def storage(request, monkeypatch):
    """The storage of the engine: that of a CPU, and that of a GPU without its streams."""
    monkeypatch.setattr("moe_worker.engine.core.HostPages", request.param)
    return request.param


both_storages = pytest.mark.usefixtures("storage")


class SettledTime(StepTime):
    """Does not learn from steps."""

    def observe(self, tokens, seconds):
        pass


def core(checkpoint, **changes):
    settings = EngineOptions(
        device="cpu", dtype="float32", context_length=256, threads=1,
        **{"kv_memory": 17 * PER_PAGE} | changes,
    )  # fmt: skip
    made = EngineCore(load(checkpoint, settings, progress=False), settings)
    if made._host is not None:  # what the test sees must not depend on this machine
        made._host.page_s = 0.0
        made._scheduler.budget.prompts = SettledTime(per_token=0.001, count=100)
    return made


def tokens(engine, number, prompt, salt=""):
    engine.submit(Request(number, tuple(prompt), SAMPLING, seed=3, salt=salt))
    found = []
    while not engine.idle:
        found += [delta.token for delta in engine.step()]
    return found


@both_storages
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


def test_memory_beyond_a_full_batch_keeps_prefixes(endless):
    """As docs/caching.md says: on a CPU the same memory does more as KV memory than as offload."""
    engine = core(endless, kv_memory=50 * PER_PAGE, max_batch_size=1)
    first, again = ([tokens(engine, number, prompt) for prompt in PROMPTS] for number in range(2))
    assert again == first
    assert engine.statistics.prefix_hit_tokens == 3 * 144


@both_storages
def test_prompts_that_come_back_together_do_not_take_frames_from_each_other(endless, monkeypatch):
    monkeypatch.setattr("moe_worker.kvcache.pinned.ARRIVING", 2 * PER_PAGE)
    engine, alone = (core(endless, kv_offload=100 * PER_PAGE, kv_memory=24 * PER_PAGE) for _ in range(2))
    expected = [tokens(alone, number, prompt) for number, prompt in enumerate(PROMPTS)]
    for number, prompt in enumerate(PROMPTS):
        assert tokens(engine, number, prompt) == expected[number]
    for number in (3, 4):
        tokens(engine, number, [90 + number, *PROMPTS[2]])
    for number in (5, 6):
        engine.submit(Request(number, tuple(PROMPTS[number - 5]), SAMPLING, seed=3))
    found = {5: [], 6: []}
    for _ in range(200):
        for delta in engine.step():
            found[delta.id].append(delta.token)
    assert engine.idle
    assert [found[5], found[6]] == expected[:2]
    assert engine.statistics.restored >= 16


@both_storages
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


@both_storages
def test_tenants_share_no_pages_in_cpu_memory(endless):
    engine = core(endless, kv_offload=100 * PER_PAGE)
    tokens(engine, 0, PROMPTS[0], "a")
    tokens(engine, 1, PROMPTS[1], "a")
    tokens(engine, 2, PROMPTS[0], "b")
    assert engine.statistics.prefix_hit_tokens == 0
    tokens(engine, 3, PROMPTS[0], "a")
    assert engine.statistics.prefix_hit_tokens == 144


@both_storages
def test_a_damaged_page_is_computed_again(endless):
    engine, plain = core(endless, kv_offload=100 * PER_PAGE), core(endless)
    expected = tokens(plain, 0, PROMPTS[0])
    tokens(engine, 0, PROMPTS[0])
    tokens(engine, 1, PROMPTS[1])
    host = engine._host
    for slots in host._blocks if isinstance(host, PinnedPages) else [host._slots]:
        for slot in slots:
            slot[5] ^= 64
    assert tokens(engine, 2, PROMPTS[0]) == expected
    assert engine.statistics.restored == 0


@both_storages
def test_pages_do_not_come_back_where_computing_them_is_faster(endless):
    engine = core(endless, kv_offload=100 * PER_PAGE)
    engine._host.page_s = 1e6
    for number, prompt in enumerate(PROMPTS * 2):
        tokens(engine, number, prompt)
    assert engine.statistics.offloaded > 0
    assert engine.statistics.restored == 0


@both_storages
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
def test_pages_are_copied_bit_by_bit(storage, dtype, width):
    cache = PagedCache.allocate(CacheShape(2, width, 4, dtype), 5, torch.device("cpu"))
    cache.storage_LRN.copy_(torch.randint(0, 256, cache.storage_LRN.shape, dtype=torch.uint8))
    before = cache.storage_LRN.clone()
    host = storage(cache, 4 * 2 * 4 * width * 4)
    host.run([Move(0, 1, True), Move(1, 3, True)])
    assert host.ready(0)
    assert not host.ready(2)
    for _ in range(2):
        host.fetch([0, 1])
    assert host.intact(0)
    assert host.intact(1)
    host.run([Move(0, 3, False), Move(1, 1, False)])
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


def pinned(pages=40, memory=40):
    cache = PagedCache.allocate(CacheShape(2, 8, 4, torch.float32), pages, torch.device("cpu"))
    cache.storage_LRN.copy_(torch.randint(0, 256, cache.storage_LRN.shape, dtype=torch.uint8))
    return cache, PinnedPages(cache, memory * 2 * 8 * 4 * 4)


@pytest.mark.parametrize("memory", [1, 6, 40])
def test_the_estimate_of_frames_is_what_they_take(monkeypatch, memory):
    monkeypatch.setattr("moe_worker.kvcache.pinned.LEAVING", 7 * 256)
    monkeypatch.setattr("moe_worker.kvcache.pinned.ARRIVING", 5 * 256)
    cache, host = pinned(memory=memory)
    taken = [part.nbytes for each in (host._out, host._in) for part in (each.all_FB, each._weights_W)]
    assert frame_bytes(memory * 256, cache.shape.page_bytes) == sum(taken)


def page_of(cache, page):
    return cache.storage_LRN[:, page * 4 : page * 4 + 4].clone()


def test_pages_pass_through_few_frames(monkeypatch):
    """Frames are used again and again, for pages in any order, out and back."""
    monkeypatch.setattr("moe_worker.kvcache.pinned.LEAVING", 7 * 256)
    monkeypatch.setattr("moe_worker.kvcache.pinned.ARRIVING", 5 * 256)
    cache, host = pinned()
    numbers = random.Random(3)
    held = {}
    for _ in range(60):
        slots = numbers.sample(range(host.slots), numbers.randint(1, 20))
        pages = [numbers.randrange(40) for _ in slots]
        host.run([Move(slot, page, True) for slot, page in zip(slots, pages, strict=True)])
        held.update((slot, page_of(cache, page)) for slot, page in zip(slots, pages, strict=True))
        wanted = numbers.sample(sorted(held), min(len(held), numbers.randint(1, 12)))
        for slot in wanted:
            left = wanted[wanted.index(slot) :]
            host.fetch(left)
            host.fetch(left)
            assert host.intact(slot)
            page = numbers.randrange(40)
            host.run([Move(slot, page, False)])
            assert torch.equal(page_of(cache, page), held[slot])


def test_a_frame_that_a_request_waits_for_is_not_taken(monkeypatch):
    monkeypatch.setattr("moe_worker.kvcache.pinned.ARRIVING", 2 * 256)
    _, host = pinned()
    host.run([Move(slot, slot, True) for slot in range(6)])
    for _ in range(2):
        host.fetch([0, 1, 2])
    assert host.intact(0)
    assert host.intact(2) is None  # there are two frames
    for _ in range(2):
        host.fetch([4, 5])
    assert host.intact(4) is None
    assert host.intact(1)
    host.run([Move(0, 9, False), Move(1, 10, False)])
    assert host.intact(0) is None
    host.fetch([3, 2])
    host.forget(3)  # its request has ended
    for _ in range(2):
        host.fetch([4, 5])
    assert host.intact(4)
    assert host.intact(5) is None


def test_a_slot_that_is_saved_again_does_not_bring_its_old_page_back():
    cache, host = pinned()
    host.run([Move(0, 1, True)])
    host.fetch([0])
    host.run([Move(0, 2, True)])
    for _ in range(2):
        host.fetch([0])
    assert host.intact(0)
    host.run([Move(0, 3, False)])
    assert torch.equal(page_of(cache, 3), page_of(cache, 2))


def run(slots, pages=4, **limits):
    settings = {"sequences": 1, "waiting": 9, "pages": pages, "page_size": 2} | limits
    return SimulatedEngine(Limits(**settings), slots)


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


def returning(tokens, **limits):
    """An engine in whose CPU memory a prompt of 20 pages is; a step has so many prompt tokens."""
    engine = run(slots=60, pages=24, prefill_tokens=tokens, least_tokens=tokens, **limits)
    prompt = [number % 3 for number in range(41)]
    serve(engine, 0, prompt)
    serve(engine, 1, [2, *prompt[1:]])
    engine.scheduler.budget.time(prompts=True).per_token = 0.5
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


def test_pages_that_save_whole_steps_come_back_although_tokens_seem_to_cost_nothing():
    for length, come in ((41, True), (7, False)):
        engine, prompt = returning(tokens=8)
        time = engine.scheduler.budget.time(prompts=True)
        time.per_token, time.fixed, engine.storage.page_s = 0.0, 10.0, 0.5
        before = engine.scheduler.offloaded[1]
        serve(engine, 2, prompt[:length])
        assert (engine.scheduler.offloaded[1] - before >= 16) == come


@pytest.mark.parametrize("weight", [1, 2])
def test_a_tenant_pays_for_the_time_in_which_its_pages_come_back(weight):
    engine, prompt = returning(tokens=8)
    engine.storage.page_s = 0.5
    before = engine.scheduler.offloaded[1]
    engine.submit(2, prompt, 1, tenant="b", weight=weight)
    tenant = engine.scheduler._policy._tenants.live["b"]
    served = tenant.served
    while not engine.outputs[2]:
        engine.step()
    pages = engine.scheduler.offloaded[1] - before
    assert pages >= 16
    assert tenant.served - served >= 0.5 * pages / weight  # and for some tokens


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


def test_a_request_waits_for_its_pages_and_others_do_not():
    engine, prompt = returning(tokens=8, sequences=2)
    engine.storage.late = 3
    engine.submit(2, prompt, 1)
    engine.submit(3, [1, 1, 1, 1], 1)
    engine.step()
    assert not engine.outputs[2]
    assert len(engine.outputs[3]) == 1
    assert engine.scheduler.offloaded[1] == 0
    while not engine.scheduler.idle:
        engine.step()
    assert engine.scheduler.offloaded[1] >= 16


@pytest.mark.parametrize("seed", range(6))
def test_pages_that_come_late_are_the_right_ones(seed):
    """Requests of several tenants, cancels, damaged pages; the engine checks every row that is read."""
    numbers = random.Random(seed)
    engine = SimulatedEngine(Limits(sequences=3, waiting=99, pages=12, page_size=2), 30)
    engine.storage.late = 2
    engine.scheduler.budget.prompts = SettledTime(per_token=0.001, count=100)
    for number in range(120):
        text = [numbers.randrange(2), *[numbers.randrange(2)] * numbers.randint(3, 9)]
        engine.submit(number, text, numbers.randint(1, 4), namespace=str(numbers.randrange(2)))
        for _ in range(numbers.randint(0, 3)):
            engine.step()
        live = [each for each in engine.arrivals if each not in engine.ended]
        if live and numbers.random() < 0.2:
            engine.cancel(numbers.choice(live))
        if numbers.random() < 0.2:
            engine.storage.lose(numbers.randrange(30))
    engine.drain()
    engine.check_pages()
    assert engine.scheduler.offloaded[1] > 20
