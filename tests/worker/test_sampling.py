"""Choosing tokens: distributions, limits and seeds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.randomness import uniform
from moe_worker.sampling.sampler import Draw, choose

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw(count=4000, logits=LOGITS, **parameters):
    """How often each token was chosen by `count` requests of different seeds."""
    draws = [Draw(SamplingParameters(**parameters), seed, 0) for seed in range(count)]
    tokens = choose(logits.expand(count, -1), draws)
    return [tokens.count(token) for token in range(len(logits))]


def test_temperature_zero_takes_the_likeliest():
    assert draw(count=3) == [3, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    counts = draw(temperature=temperature)
    expected = (LOGITS / temperature).softmax(0).double() * sum(counts)
    assert stats.chisquare(counts, (expected * (sum(counts) / expected.sum())).tolist()).pvalue > 1e-3


def test_frequencies_over_the_tokens_of_one_request_follow_the_softmax():
    draws = [Draw(SamplingParameters(temperature=1.0), 1234, index) for index in range(4000)]
    tokens = choose(LOGITS.expand(4000, -1), draws)
    counts = [tokens.count(token) for token in range(6)]
    expected = LOGITS.double().softmax(0) * 4000
    assert stats.chisquare(counts, expected.tolist()).pvalue > 1e-3


def test_top_k_keeps_the_likeliest():
    counts = draw(temperature=1.0, top_k=2)
    assert counts[2:] == [0, 0, 0, 0]
    share = math.e / (1 + math.e)
    assert stats.binomtest(counts[0], 4000, share).pvalue > 1e-3


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, 1), (0.5, 1), (0.6, 2), (0.85, 3), (1.0, 6)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    """The cumulated probabilities are 0.561, 0.767, 0.892, 0.968, 0.996 and 1."""
    assert sum(count > 0 for count in draw(temperature=1.0, top_p=top_p)) == kept


def test_the_smallest_temperature_is_greedy_and_finite():
    assert draw(count=10, temperature=1e-30)[0] == 10


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_uniform_is_below_one(seed, index):
    assert 0 <= uniform(seed, index) < 1


def test_uniform_is_uniform_and_seeds_are_independent():
    values = [uniform(seed, index) for seed in range(50) for index in range(50)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    first, second = ([uniform(seed, index) for index in range(2000)] for seed in (1, 2))
    assert abs(stats.pearsonr(first, second).statistic) < 0.1


def test_a_choice_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    logits = torch.randn(4, 50)
    draws = [
        Draw(SamplingParameters(temperature=t, top_p=p), 5, i)
        for i, (t, p) in enumerate([(1, 1), (0, 1), (0.7, 0.9), (2, 0.5)])
    ]
    together = choose(logits, draws)
    assert together == [choose(logits[i : i + 1], [draws[i]])[0] for i in range(4)]


@pytest.mark.parametrize(
    ("field", "parameters"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": math.nan}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("top_p", {"top_p": math.nan}),
        ("top_k", {"top_k": -1}),
        ("seed", {"seed": -1}),
        ("stop", {"stop": ("x",) * 17}),
        ("stop[1]", {"stop": ("x", "")}),
        ("stop[0]", {"stop": ("é" * 129,)}),
    ],
)
def test_impossible_parameters_are_named(field, parameters):
    [violation] = SamplingParameters(**parameters).violations()
    assert violation.field == field
    assert "use" in violation.description


def test_the_limits_themselves_are_allowed():
    extremes = SamplingParameters(100, 2.0, 1e-9, 10**6, 2**64 - 1, ("x" * 256,) * 16)
    assert extremes.violations() == []
