"""The engine as a library."""

import resource
from pathlib import Path

import pytest
import torch

import moe_worker
from moe_worker.engine import loading
from moe_worker.errors import RequestError, SettingsError
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.sampling.parameters import SamplingParameters

PROMPTS = ["hello", "the quick brown fox " * 5, "x", "naïve café", "日本語", "a b c d", "lazy dog", "🙂"]


def test_every_form_of_prompt(engine):
    ids = engine.tokenizer.encode("hello")
    sampling = SamplingParameters(max_tokens=8)
    expected = engine.generate(["hello"], sampling)
    assert engine.generate("hello", sampling) == expected
    assert engine.generate(ids, sampling) == expected
    assert engine.generate([ids], sampling) == expected
    assert engine.generate(["hello", ids], sampling) == expected * 2
    assert engine.generate([], sampling) == []


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11, "top_p": 0.9, "top_k": 50}])
def test_tokens_do_not_depend_on_the_batch(checkpoint, sampling):
    """More prompts than slots: some start while others decode, at other lengths and in other slots."""
    engine = moe_worker.Engine(checkpoint, context_length=256, max_batch_size=3, threads=1)
    parameters = SamplingParameters(max_tokens=24, **sampling)
    together = engine.generate(PROMPTS, parameters)
    assert together == [engine.generate(prompt, parameters)[0] for prompt in PROMPTS]


def test_a_seed_repeats_and_another_differs(engine):
    first, again, other = (
        engine.generate("hello", SamplingParameters(max_tokens=20, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_without_a_seed_samples_differ(engine):
    sampling = SamplingParameters(max_tokens=20, temperature=1.0)
    assert engine.generate("hello", sampling) != engine.generate("hello", sampling)


def test_the_end_of_text_token_stops(engine):
    """A random model meets it within a few hundred samples."""
    results = engine.generate(["hello"] * 40, SamplingParameters(max_tokens=100, temperature=1.5))
    stopped = [result for result in results if result.finish_reason == "stop"]
    assert stopped
    for result in stopped:
        assert result.token_ids.index(1) == len(result.token_ids) - 1
        assert "<|end|>" not in result.text


def test_a_stop_text_ends_and_is_not_in_the_text(engine):
    [free] = engine.generate("hello", SamplingParameters(max_tokens=40))
    stop = free.text[10:13]
    [result] = engine.generate("hello", SamplingParameters(max_tokens=40, stop=(stop,)))
    assert result.finish_reason == "stop"
    assert result.text == free.text[: free.text.index(stop)]
    assert result.token_ids == free.token_ids[: len(result.token_ids)]


def test_the_context_length_ends_a_text(checkpoint):
    engine = moe_worker.Engine(checkpoint, context_length=16, threads=1)
    [result] = engine.generate([5] * 10, SamplingParameters(max_tokens=16))
    assert (len(result.token_ids), result.finish_reason) == (6, "length")


def test_the_cache_takes_memory_only_as_it_is_written():
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    shape = CacheShape(layers=3, width=24, page_size=16, dtype=torch.float32)
    cache = PagedCache.allocate(shape, 1024 * 256, torch.device("cpu"))  # 1.2 GB
    assert resident_bytes() - before < 50 * 2**20
    rows = cache.sequence(layer=2, pages=range(1023 * 256, 1024 * 256), length=4096)
    assert rows.shape == (4096, 24)
    assert not rows.any()


def test_a_step_reuses_the_memory_of_the_step_before(engine):
    """64 MiB in tensors of 8 MiB are 16,384 pages of 4 KiB.

    It may be another of several free places of one tensor that a step takes at first, so one of some steps
    counts. Where glibc returns memory to the system, each step takes thousands of page faults.
    """

    def page_faults_of_a_step():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2 << 20) for _ in range(8)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(page_faults_of_a_step() for _ in range(6)) < 1000


def test_a_cache_that_cannot_be_is_refused_before_weights_are_read(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(SettingsError, match="KV memory of 1024 bytes is too small"):
        moe_worker.Engine(checkpoint, kv_memory=1024)


def test_kv_memory_limits_the_batch_but_not_the_answers(checkpoint, engine):
    per_token = 3 * (16 + 8) * 4
    small = moe_worker.Engine(checkpoint, context_length=256, kv_memory=256 * per_token * 2, threads=1)
    sampling = SamplingParameters(max_tokens=8)
    assert small.generate(PROMPTS, sampling) == engine.generate(PROMPTS, sampling)


@pytest.mark.parametrize(
    ("prompt", "sampling", "sentence"),
    [
        ([0] * 512, {}, "512 tokens; use 511 at most"),
        ([320], {}, "token id 320; ids are 0 to 319"),
        ([[]], {}, "is empty"),
        ("x", {"top_p": 2.0}, "top_p is 2; use a number above 0"),
    ],
)
def test_bad_requests_are_refused_with_a_sentence(engine, prompt, sampling, sentence):
    with pytest.raises(RequestError, match=sentence):
        engine.generate(prompt, SamplingParameters(**sampling))


@pytest.mark.parametrize("ids", [[], [320], [-1], [1] * 513])
def test_logits_refuse_what_the_model_cannot_take(engine, ids):
    with pytest.raises(RequestError, match=r"it must be 1 to 512|ids are 0 to 319"):
        engine.logits(ids)
