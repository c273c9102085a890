"""Pages that leave the GPU for pinned memory and come back while steps run: the same tokens.

Run as tests/gpu/test_triton_kernels.py says. Logits differ in their last bits with the size of a step, so
both engines compare with plain float32, and pages are compared bit by bit.
"""

import random

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_random import SMALL
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.requests import Request
from moe_worker.kvcache.offload import Move
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.kvcache.pinned import PinnedPages
from moe_worker.sampling.parameters import SamplingParameters
from tests.gpu.device import DEVICE, INTERPRETED, needs_device
from tests.gpu.test_cuda_engine import FEW_LAYERS, Both, tokens_of

pytestmark = needs_device
GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


def engine(both, **options):
    settings = EngineOptions(max_batch_size=8, prefill_tokens=256, **options)
    core = EngineCore(both.loaded, settings, flights=2)
    if options.get("kv_offload") and DEVICE.type == "cpu":
        core._host = storage = PinnedPages(both.cache, options["kv_offload"])
        core._scheduler._policy.memory.offload._storage = storage
    if core._host is not None:
        # What the test sees depends on no measured time: small captured steps take the same for all sizes.
        core._scheduler._policy.memory._worth = lambda pages: True
        core._host.page_s = 0.0
    return core


def answers(core, prompts):
    """One after the other, so that steps have the same sizes in every engine; then all is evicted."""
    found, tokens = [], 2 if INTERPRETED else 16
    for number, prompt in enumerate(prompts):
        core.submit(Request(number, tuple(prompt), SamplingParameters(max_tokens=tokens, ignore_eos=True), 0))
        found.append([])
        while not core.idle:
            found[-1] += [delta.token for delta in core.step()]
    tree = core._scheduler._policy.memory.tree
    tree.evict(tree.idle)
    for _ in range(2):
        core.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    return found


def test_prompts_that_were_evicted_come_back_with_the_same_tokens():
    both = Both(FEW_LAYERS if INTERPRETED else SMALL, "dense")
    prompts = [tokens_of(34, seed=0)] if INTERPRETED else [tokens_of(110, seed=number) for number in range(5)]
    pages = sum((len(prompt) - 1) // 16 for prompt in prompts)
    fresh, kept = engine(both), engine(both, kv_offload=64 << 20)
    first = answers(kept, prompts)
    assert first == answers(fresh, prompts)
    assert kept.statistics.restored == 0
    back = answers(kept, prompts)
    assert kept.statistics.restored == pages
    # Steps are shorter now, so last bits of logits differ: few tokens may, from where two are close.
    assert [tokens[0] for tokens in back] == [tokens[0] for tokens in first]
    again = answers(kept, prompts)
    assert again == back
    assert kept.statistics.restored == 2 * pages


@GPU
def test_pages_are_the_same_after_both_ways(monkeypatch):
    """Computing goes on meanwhile: each page is overwritten as soon as it was gathered."""
    shape, pages = CacheShape(27, 576, 16, torch.bfloat16), 200
    cache = PagedCache.allocate(shape, pages, DEVICE)
    page_bytes = 27 * 576 * 16 * 2
    monkeypatch.setattr("moe_worker.kvcache.pinned.LEAVING", 40 * page_bytes)
    monkeypatch.setattr("moe_worker.kvcache.pinned.ARRIVING", 24 * page_bytes)
    host = PinnedPages(cache, 160 * page_bytes)
    numbers, truth = random.Random(1), {}
    for _ in range(5):
        cache.storage_LRN.random_(0, 256)
        chosen = numbers.sample(range(pages), 120)
        slots = numbers.sample(range(host.slots), 120)
        truth |= {slot: page_of(cache, page) for slot, page in zip(slots, chosen, strict=True)}
        host.run([Move(slot, page, True) for slot, page in zip(slots, chosen, strict=True)])
        cache.storage_LRN.random_(0, 256)
        wanted = numbers.sample(sorted(truth), 50)
        while wanted:
            host.run([])
            host.fetch(slot for slot in wanted if host.ready(slot))
            back = [slot for slot in wanted if host.ready(slot) and host.intact(slot)]
            wanted = [slot for slot in wanted if slot not in back]
            host.run([Move(slot, page, False) for page, slot in enumerate(back)])
            for page, slot in enumerate(back):
                assert torch.equal(page_of(cache, page), truth[slot])


@GPU
def test_a_bit_that_flips_in_pinned_memory_is_noticed():
    cache = PagedCache.allocate(CacheShape(3, 64, 16, torch.bfloat16), 8, DEVICE)
    cache.storage_LRN.random_(0, 256)
    host = PinnedPages(cache, 1 << 20)
    host.run([Move(slot, slot, True) for slot in range(4)])
    torch.cuda.synchronize()
    host._blocks[0][2, 77] ^= 4
    host.run([])
    host.fetch(range(4))
    torch.cuda.synchronize()
    host.fetch(())
    assert [host.intact(slot) for slot in range(4)] == [True, True, False, True]


@GPU
def test_the_host_waits_for_no_copy():
    """CUDA itself raises where the host would wait."""
    cache = PagedCache.allocate(CacheShape(3, 64, 16, torch.bfloat16), 64, DEVICE)
    host = PinnedPages(cache, 1 << 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        host.run([Move(slot, slot, True) for slot in range(20)])
        host.fetch(range(20))
        host.run([])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def page_of(cache, page):
    return cache.storage_LRN[:, page * cache.page_size : (page + 1) * cache.page_size].clone()
