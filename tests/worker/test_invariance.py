"""What a request gets does not depend on how the engine computed it: fp32, identical tokens.

Each way of computing is compared with one request at a time, each prompt in one piece, nothing cached.
"""

import pytest

import moe_worker
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Request
from moe_worker.sampling.parameters import SamplingParameters
from tests.checkpoints import write_checkpoint

SHARED = [7 + i % 290 for i in range(70)]
PROMPTS = [
    SHARED,
    [*SHARED, 11, 12, 13],
    SHARED[:48],
    [*SHARED[:40], 99, 98],
    [5],
    [300 - i % 250 for i in range(150)],
    [*SHARED, 11, 12, 13],
]
TOKENS = 40
PER_PAGE = 16 * 3 * 24 * 4
WAYS = {
    "together": {},
    "prompts cut into pieces of 5": {"prefill_tokens": 5},
    "pages of one token": {"page_size": 1},
    "pages of 64": {"page_size": 64},
    "no shared prompts": {"prefix_cache": False},
    "too few pages for all": {"kv_memory": 17 * PER_PAGE},
    "too few pages, small pieces": {"kv_memory": 17 * PER_PAGE, "prefill_tokens": 7},
    "two at a time": {"max_batch_size": 2},
    "a step ahead": {"flights": 2},
    "too few pages, a step ahead": {"flights": 2, "kv_memory": 17 * PER_PAGE, "prefill_tokens": 7},
}
SAMPLINGS = {
    "greedy": SamplingParameters(max_tokens=TOKENS),
    "seeded": SamplingParameters(max_tokens=TOKENS, temperature=1.2, top_p=0.95, top_k=80, seed=5),
}


def run(checkpoint, prompts, sampling, flights=1, **options):
    """Tokens of each prompt, and what the scheduler counted."""
    settings = EngineOptions(device="cpu", dtype="float32", context_length=256, threads=1, **options)
    core = EngineCore(load(checkpoint, settings, progress=False), settings, flights=flights)
    for number, prompt in enumerate(prompts):
        core.submit(Request(number, tuple(prompt), sampling, seed=sampling.seed or 0))
    tokens = [[] for _ in prompts]
    while not core.idle:
        for delta in core.step():
            tokens[delta.id].append(delta.token)
    assert core.load.running == core.load.queued == 0
    return tokens, core.counters


@pytest.fixture(scope="module", params=SAMPLINGS)
def expected(request, endless):
    sampling = SAMPLINGS[request.param]
    alone = [run(endless, [prompt], sampling, prefix_cache=False)[0][0] for prompt in PROMPTS]
    assert all(len(tokens) == TOKENS for tokens in alone)
    return sampling, alone


@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_how_they_are_computed(endless, expected, way):
    sampling, alone = expected
    tokens, counters = run(endless, PROMPTS, sampling, **WAYS[way])
    assert tokens == alone
    assert (counters.preemptions > 0) == way.startswith("too few pages")


def test_a_cached_prompt_gives_the_same_and_is_not_computed_again(endless):
    sampling = SAMPLINGS["greedy"]
    settings = EngineOptions(device="cpu", dtype="float32", context_length=256, threads=1)
    core = EngineCore(load(endless, settings, progress=False), settings)

    def once(number):
        core.submit(Request(number, tuple(PROMPTS[5]), sampling, seed=0))
        tokens = []
        while not core.idle:
            tokens += [delta.token for delta in core.step()]
        return tokens

    first = once(0)
    assert core.counters.prefix_hit_tokens == 0
    assert once(1) == first
    # 150 tokens are 9 whole pages of 16.
    assert core.counters.prefix_hit_tokens == 144


def test_a_cancelled_request_leaves_nothing_behind(endless):
    settings = EngineOptions(device="cpu", dtype="float32", context_length=256, threads=1, prefix_cache=False)
    core = EngineCore(load(endless, settings, progress=False), settings)
    for number, prompt in enumerate(PROMPTS):
        core.submit(Request(number, tuple(prompt), SAMPLINGS["greedy"], seed=0))
    core.step()
    core.step()
    assert core.load.kv_tokens_used > 0
    for number in range(len(PROMPTS)):
        core.cancel(number)
    assert core.idle
    assert core.load.kv_tokens_used == 0
    assert core.step() == []


def test_the_library_uses_the_same_engine(endless):
    engine = moe_worker.Engine(endless, context_length=256, threads=1, prefill_tokens=16)
    results = engine.generate(PROMPTS, SAMPLINGS["greedy"])
    assert [result.token_ids for result in results] == run(endless, PROMPTS, SAMPLINGS["greedy"])[0]


@pytest.mark.parametrize(("tokens", "pages"), [(40, 12), pytest.param(80, 25, marks=pytest.mark.slow)])
def test_seeded_draws_do_not_depend_on_how_they_are_computed(tmp_path, tokens, pages):
    """At vocabulary 100,000, 1,000 or 2,000 draws: one at a time, together, and with too few pages."""
    changes = {"vocab_size": 100_000, "max_position_embeddings": 256, "eos_token_id": None}
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=2, hidden_size=32, **changes)
    prompts = [[7 + (i * step) % 290 for i in range(10 + 3 * step)] for step in range(1, 26)]
    sampling = SamplingParameters(max_tokens=tokens, temperature=1.0, seed=24)
    engine = moe_worker.Engine(checkpoint, context_length=256, threads=1, prefix_cache=False)
    alone = [engine.generate([prompt], sampling)[0].token_ids for prompt in prompts]
    assert [result.token_ids for result in engine.generate(prompts, sampling)] == alone
    drawn, counters = run(checkpoint, prompts, sampling, kv_memory=pages * PER_PAGE, prefill_tokens=7)
    assert drawn == alone
    assert counters.preemptions > 0
