"""What the engine counts, against sums made another way."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Request
from moe_worker.engine.statistics import (
    Event,
    EventKind,
    ExpertStatistics,
    LayerExperts,
    Tally,
    decode_tokens,
)
from moe_worker.moe.counting import Choice, ExpertCounter
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.scheduler.core import Scheduler
from moe_worker.scheduler.plan import Arrival, Limits
from moe_worker.service.instruments import Histogram
from moe_worker.service.metrics import imbalance

EXPERTS = 5


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2**32 - 1)), max_size=12),
    st.integers(1, 5),
    st.lists(st.integers(0, 11), max_size=3),
)
def test_experts_are_counted_as_numpy_counts_them(passes, keep, reads):
    """Passes of 1 to 4 tokens and a row of padding, kept and added up in any way, read at any time."""
    choices = [Choice(), Choice()]
    counter = ExpertCounter([1, 4], choices, EXPERTS, keep)
    tokens, active = np.zeros((2, EXPERTS), dtype=int), np.zeros(2, dtype=int)
    for number, (length, seed) in enumerate(passes):
        generator = np.random.default_rng(seed)
        for layer, choice in enumerate(choices):
            chosen = np.array([generator.permutation(EXPERTS)[:2] for _ in range(length + 1)])
            choice.experts_TK = torch.from_numpy(chosen)
            counts = np.bincount(chosen[:length].ravel(), minlength=EXPERTS)
            tokens[layer] += counts
            active[layer] += np.count_nonzero(counts)
        counter.count(length)
        if number in reads:
            counter.read()
    steps, layers = counter.read()
    assert steps == len(passes)
    if passes:
        assert layers == [
            (1, tokens[0].tolist(), active[0]),
            (4, tokens[1].tolist(), active[1]),
        ]


@pytest.mark.parametrize("length", [3, 60])
def test_experts_are_those_that_transformers_chooses(endless, length):
    """Two texts computed side by side; each of their tokens, but the last, passes every layer once."""
    core = EngineCore(
        load(endless, EngineOptions(threads=1, prefix_cache=False), progress=False), EngineOptions()
    )
    prompts = {1: tuple(range(5, 5 + length)), 2: tuple(range(40, 80))}
    texts = {number: list(prompt) for number, prompt in prompts.items()}
    for number, prompt in prompts.items():
        core.submit(Request(number, prompt, SamplingParameters(max_tokens=10), seed=0))
    while not core.idle:
        for delta in core.step():
            texts[delta.id].append(delta.token)
    model = AutoModelForCausalLM.from_pretrained(endless, dtype=torch.float32)
    chosen = {index: [] for index in (1, 2)}
    for index, found in chosen.items():
        gate = model.model.layers[index].mlp.gate
        gate.register_forward_hook(lambda _, __, out, found=found: found.append(out[2].flatten()))
    with torch.inference_mode():
        for text in texts.values():
            model(torch.tensor([text[:-1]]))
    expected = [(index, torch.cat(found).bincount(minlength=8).tolist()) for index, found in chosen.items()]
    experts = core.expert_statistics
    assert [(layer.layer, list(layer.tokens)) for layer in experts.layers] == expected
    assert experts.steps == core.statistics.steps
    for layer in experts.layers:
        assert 2 * experts.steps <= layer.active <= 8 * experts.steps


def run(scheduler, tally, requests):
    """Runs all requests to their ends with made-up tokens."""
    now, prompts = 0.0, {}
    for number, (prompt, new) in enumerate(requests):
        prompts[number] = prompt
        scheduler.submit(Arrival(number, [number % 7 + 1] * prompt, new, now))
    steps = []
    while not scheduler.idle:
        plan = scheduler.plan(now)
        tally.note(plan, dict.fromkeys(plan.preempted, 100))
        if plan.step is None:
            continue
        now += 0.01
        chunks = plan.step.chunks
        sampled = sum(chunk.samples for chunk in chunks)
        scheduler.complete(plan.step, [3] * sampled, now)
        tally.count(plan.step, decode_tokens(chunks, [prompts[chunk.id] for chunk in chunks]), sampled)
        steps.append(plan.step)
    return steps


REQUESTS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=8)


@given(REQUESTS)
def test_tokens_of_prompts_and_of_texts_add_up(requests):
    scheduler, tally = Scheduler(Limits(4, 8, pages=64, prefix_cache=False)), Tally()
    steps = run(scheduler, tally, requests)
    sums = tally.statistics(scheduler.counters, scheduler.evictions)
    assert sums.prefill_tokens == sums.prompt_tokens == sum(prompt for prompt, _ in requests)
    assert sums.output_tokens == sum(new for _, new in requests)
    assert sums.decode_tokens == sums.output_tokens - len(requests)
    assert (sums.steps, sums.sequences) == (len(steps), sum(len(step.chunks) for step in steps))
    events = tally.take_events()
    assert sorted(events) == [Event(number, EventKind.ADMITTED, 0) for number in range(len(requests))]


@given(REQUESTS)
def test_what_the_cache_had_is_not_computed(requests):
    # Room for four of the longest requests: none is preempted and recomputed.
    scheduler, tally = Scheduler(Limits(4, 8, pages=96, page_size=4)), Tally()
    run(scheduler, tally, requests)
    sums = tally.statistics(scheduler.counters, scheduler.evictions)
    assert sums.prompt_tokens - sums.prefix_hit_tokens == sums.prefill_tokens
    hits = [event.tokens for event in tally.take_events() if event.kind is EventKind.ADMITTED]
    assert sum(hits) == sums.prefix_hit_tokens
    assert tally.take_events() == ()


def test_a_request_that_gives_way_is_an_event_and_is_computed_again():
    scheduler, tally = Scheduler(Limits(2, 2, pages=8, page_size=4, prefix_cache=False)), Tally()
    run(scheduler, tally, [(4, 20), (4, 20)])
    sums = tally.statistics(scheduler.counters, scheduler.evictions)
    preempted = [event for event in tally.take_events() if event.kind is EventKind.PREEMPTED]
    assert len(preempted) == sums.preemptions > 0
    assert preempted[0].tokens == 100
    assert sums.prefill_tokens + sums.decode_tokens > 2 * (4 + 20 - 1)
    assert sums.recomputed_tokens > 0


@given(st.lists(st.floats(0, 10), max_size=50))
def test_a_histogram_counts_as_numpy_does(values):
    bounds = (0.5, 1.0, 2.5)
    histogram = Histogram(bounds)
    for value in values:
        histogram.record(value)
    # numpy's bins are closed below, OpenTelemetry's above.
    expected, _ = np.histogram(
        [-value for value in values], [-np.inf, *[-b for b in reversed(bounds)], np.inf]
    )
    on_edge = [sum(value == bound for value in values) for bound in bounds]
    assert sum(histogram.counts) == len(values)
    assert histogram.sum == pytest.approx(sum(values))
    if not any(on_edge):
        assert histogram.counts == expected[::-1].tolist()


def test_a_value_on_a_bound_belongs_below_it():
    histogram = Histogram((0.5, 1.0))
    histogram.record(0.5)
    histogram.record(1.0)
    assert histogram.counts == [1, 1, 0]


def test_imbalance_is_the_busiest_over_the_mean():
    assert imbalance(LayerExperts(0, (4, 4, 4), 3)) == 1
    assert imbalance(LayerExperts(0, (9, 0, 0), 3)) == 3
    assert imbalance(LayerExperts(0, (0, 0), 0)) == 1


def test_what_was_counted_between_two_reports():
    before = ExpertStatistics(2, (LayerExperts(1, (3, 1), 3),), tokens=2, experts_per_token=2)
    after = ExpertStatistics(5, (LayerExperts(1, (4, 6), 8),), tokens=5, experts_per_token=2)
    difference = ExpertStatistics(3, (LayerExperts(1, (1, 5), 5),), tokens=3, experts_per_token=2)
    assert after.since(before) == difference
    assert after.since(ExpertStatistics()) == after
