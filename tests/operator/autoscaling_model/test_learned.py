"""Cold starts and capacity, learned from what was seen."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_operator.autoscaling.model.capacity import Capacity
from moe_operator.autoscaling.model.horizon import ColdStarts, steps_ahead


def seen(durations):
    starts = ColdStarts()
    for duration in durations:
        starts = starts.observed(duration)
    return starts


def test_five_cold_starts_replace_the_default():
    assert seen([10, 20, 30, 40]).horizon_s == 300
    assert seen([10, 20, 30, 40, 50]).horizon_s == 50
    assert seen([10, 20, 30, 40, -5, math.nan]).horizon_s == 300


@given(st.lists(st.floats(1, 1e4), min_size=5, max_size=32))
def test_the_horizon_is_the_p90_that_numpy_knows(durations):
    assert seen(durations).horizon_s == np.percentile(durations, 90, method="inverted_cdf")


def test_the_minute_planned_for_begins_when_a_replica_ordered_now_is_there():
    # The last finished minute is number 9; it is 600 s, a replica is ready at 900 s, in minute 15.
    assert 9 + steps_ahead(300) == 15
    assert 9 + steps_ahead(301) == 16


def test_capacity_finds_what_replicas_can_do_from_either_side():
    chance = np.random.default_rng(1)
    for prior in (30.0, 300.0):
        capacity = Capacity.from_prior(prior)
        for _ in range(500):
            rate = chance.uniform(0, 200)
            capacity = capacity.observed(rate, within_target=rate <= 100)
        assert capacity.per_replica == pytest.approx(100, rel=0.15)
        assert capacity.learned


def test_quiet_minutes_in_time_teach_nothing():
    before = Capacity.from_prior(100.0)
    assert before.observed(20, within_target=True) == before


@given(st.lists(st.tuples(st.floats(), st.booleans(), st.booleans())))
def test_capacity_stays_within_a_hundredth_and_a_hundredfold_of_the_prior(minutes):
    capacity = Capacity.from_prior(60.0)
    for rate, within, saturated in minutes:
        capacity = capacity.observed(rate, within_target=within, saturated=saturated)
    assert 0.6 <= capacity.per_replica <= 6000
