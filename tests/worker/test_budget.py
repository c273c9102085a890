"""The estimate of step times compared with numpy's weighted fit, and the resulting budget."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_worker.scheduler.budget import MEMORY, RECENT, StepTime, TokenBudget
from moe_worker.scheduler.plan import Limits
from moe_worker.scheduler.rate import FIRST_DELAY_S, MOST_DELAY_S, EndRate


def observed(steps):
    time = StepTime()
    for tokens, seconds in steps:
        time.observe(tokens, seconds)
    return time


def test_the_estimate_is_a_least_squares_fit_with_fading_weights():
    chance = np.random.default_rng(0)
    tokens = chance.integers(1, 500, 80)
    seconds = 0.02 + 0.0003 * tokens + chance.normal(0, 0.002, 80)
    weights = MEMORY ** np.arange(79, -1, -1.0)
    slope, fixed = np.polyfit(tokens, seconds, 1, w=np.sqrt(weights))
    time = observed(zip(tokens.tolist(), seconds.tolist(), strict=True))
    assert time.per_token == pytest.approx(slope, rel=1e-9)
    assert time.fixed == pytest.approx(fixed, rel=1e-9)


def test_steps_of_one_size_leave_the_cost_of_a_token_as_it_was():
    steps = [(10, 0.011), (200, 0.030)] * 10 + [(10, 0.011)] * 2000
    time = observed(steps)
    assert time.per_token == pytest.approx(0.0001, rel=1e-3)
    slower = observed([*steps, *[(10, 0.031)] * 500])
    assert slower.per_token == pytest.approx(0.0001, rel=1e-3)
    assert slower.fixed == pytest.approx(0.030, rel=1e-3)


def test_one_step_that_took_for_ever_hardly_counts():
    calm = [(100, 0.02), (10, 0.011)] * 20
    assert observed([*calm, (100, 100.0)]).estimate(100) < 2 * observed(calm).estimate(100)


def test_the_smallest_step_is_known_as_long_as_it_is_recent():
    assert StepTime().least == math.inf
    steps = [(16, 0.03)] * 60 + [(1, 0.01)]
    assert observed(steps).least == 1
    assert observed(steps + [(16, 0.03)] * RECENT).least == 1
    assert observed(steps + [(16, 0.03)] * 2 * RECENT).least == 16


def test_the_budget_is_what_fits_the_aim():
    budget = TokenBudget(Limits(sequences=64, waiting=0, pages=1, prefill_tokens=4000, target_s=0.05))
    budget.prompts = observed([(1000, 0.110), (100, 0.020)])
    assert budget.sequences == pytest.approx(400, abs=1)
    assert budget.prompt_tokens(decoding=64) == pytest.approx(336, abs=1)
    assert budget.prompt_tokens(decoding=0) == 4000
    assert budget.prompt_tokens(decoding=500) == Limits.least_tokens


def test_where_a_step_alone_misses_the_aim_prompts_may_double_it():
    budget = TokenBudget(Limits(sequences=64, waiting=0, pages=1, prefill_tokens=4000, target_s=0.01))
    budget.prompts = observed([(1000, 0.200), (100, 0.110)])
    assert budget.prompt_tokens(decoding=64) == pytest.approx(936, abs=1)


@given(
    steps=st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1e3)), max_size=30),
    sequences=st.integers(1, 300),
    prefill=st.integers(1, 5000),
    least=st.integers(1, 300),
    target_s=st.floats(0, 10),
    shrunk=st.none() | st.integers(0, 5000),
)
def test_prompts_always_move_and_steps_stay_within_their_bounds(
    steps, sequences, prefill, least, target_s, shrunk
):
    limits = Limits(sequences, 0, 1, prefill_tokens=prefill, least_tokens=least, target_s=target_s)
    budget = TokenBudget(limits)
    budget.prompts = observed(steps)
    if shrunk is not None:
        budget.shrink(shrunk)
    assert 1 <= budget.sequences <= limits.step_tokens
    for decoding in (0, 1, sequences):
        assert 1 <= budget.prompt_tokens(decoding) <= prefill


def test_the_delay_follows_the_rate_at_which_requests_end():
    rate = EndRate()
    rate.start(100.0)
    assert rate.delay_s(100.0) == FIRST_DELAY_S
    for number in range(20):
        rate.count(100.0 + 2.0 * number)
    assert rate.delay_s(138.0) == pytest.approx(2.0, rel=0.15)
    assert rate.delay_s(1e6) == pytest.approx(MOST_DELAY_S)
    for number in range(100_000):
        rate.count(200.0 + 0.001 * number)
    assert rate.delay_s(300.0) == 0.05
