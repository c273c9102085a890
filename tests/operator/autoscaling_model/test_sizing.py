"""What a plan never does, whatever it sees."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_operator.autoscaling.model.forecast.forecaster import Forecaster
from moe_operator.autoscaling.model.forecast.result import Errors, Forecast
from moe_operator.autoscaling.model.sizing import Situation, Want, size
from moe_operator.autoscaling.model.spec import ScalingSpec

NOW = 1_000_000.0
rates = st.floats(0, 1e6)


def forecast(rate: float, *, errors: Errors = Errors()) -> Forecast:  # noqa: B008
    return Forecast(NOW + 300, rate, ((0.5, rate), (0.95, 1.3 * rate), (0.99, 1.5 * rate)), "test", errors)


@st.composite
def specs(draw):
    least = draw(st.integers(0, 20))
    return ScalingSpec(
        min_replicas=least,
        max_replicas=draw(st.integers(max(least, 1), 60)),
        capacity_prior=100.0,
        gpus_per_replica=draw(st.sampled_from([0.5, 1.0, 8.0])),
        gpu_limit=draw(st.none() | st.floats(8, 100)),
        target_utilisation=draw(st.floats(0.3, 1.0)),
    )


@st.composite
def worlds(draw):
    replicas = draw(st.integers(0, 60))
    wants = draw(st.lists(st.tuples(st.floats(0, 2000), st.integers(0, 80)), max_size=5))
    return Situation(
        replicas=replicas,
        starting=draw(st.integers(0, replicas)),
        demand=draw(st.none() | rates),
        capacity=draw(st.floats(1, 1e4)),
        horizon_s=draw(st.floats(10, 1800)),
        waiting=draw(st.floats(0, 1e4)),
        idle_since=draw(st.none() | st.floats(NOW - 1e4, NOW)),
        wants=tuple(Want(NOW - ago, number) for ago, number in sorted(wants, reverse=True)),
    )


forecasts = st.none() | rates.map(forecast)


@given(specs(), worlds(), forecasts)
def test_a_plan_keeps_to_the_limits_and_to_its_arguments(spec, situation, ahead):
    first = size(spec, situation, ahead, NOW)
    assert spec.least <= first.replicas <= spec.most
    assert first.message
    assert first.reason[0].isupper()
    assert " " not in first.reason
    assert size(spec, situation, ahead, NOW) == first


@given(specs(), worlds(), forecasts, st.floats(0, 1e6))
def test_more_demand_never_means_fewer_replicas(spec, situation, ahead, more):
    if situation.demand is None:
        return
    higher = replace(situation, demand=situation.demand + more)
    assert size(spec, higher, ahead, NOW).replicas >= size(spec, situation, ahead, NOW).replicas


@given(specs(), worlds(), rates, st.floats(0, 1e6))
def test_a_higher_forecast_never_means_fewer_replicas(spec, situation, rate, more):
    low = size(spec, situation, forecast(rate), NOW)
    assert size(spec, situation, forecast(rate + more), NOW).replicas >= low.replicas


@given(specs(), worlds(), rates, rates)
def test_constant_demand_does_not_flap(spec, situation, rate, ahead):
    numbers = [situation.replicas]
    situation = replace(situation, demand=rate, idle_since=None)
    for minute in range(60):
        made = size(spec, situation, forecast(ahead), NOW + 60 * minute)
        numbers.append(made.replicas)
        situation = replace(situation, replicas=made.replicas, starting=0, waiting=0.0, wants=made.wants)
    changes = [(b > a) - (b < a) for a, b in itertools.pairwise(numbers[1:]) if a != b]
    assert changes == sorted(changes, reverse=True), "no step up after a step down"
    assert len(set(numbers[-25:])) == 1, "whatever was remembered has been forgotten after the longest delay"


@pytest.fixture(scope="module")
def noise():
    """A day of minutes of 3 requests/s that come independently of each other, with their forecasts."""
    rates = np.random.default_rng(12).poisson(180, 2160).astype(float)
    forecaster, made = Forecaster(5), []
    for minute, rate in enumerate(rates):
        forecaster.update(minute, rate)
        if forecaster.refit_due and minute % 360 == 60:
            forecaster.adopt(forecaster.refit_job()())
        made.append((rate, forecaster.forecast()))
    return made[720:]


@given(capacity=st.floats(6, 250))
def test_constant_demand_with_noise_changes_replicas_now_and_then_and_by_one(noise, capacity):
    spec, wants, numbers = ScalingSpec(1, 100, capacity), (), [1]
    for minute, (rate, ahead) in enumerate(noise):
        situation = Situation(numbers[-1], 0, rate, capacity, 300.0, wants=wants)
        made = size(spec, situation, ahead, NOW + 60 * minute)
        wants = made.wants
        numbers.append(made.replicas)
    settled = numbers[30:]
    assert max(settled) - min(settled) <= 2 + 0.1 * min(settled)
    changes = sum(a != b for a, b in itertools.pairwise(settled))
    assert changes <= 40, "however capacity lies to demand, a day has few; without any tolerance over 100"


@given(specs(), worlds(), forecasts)
def test_replicas_that_start_are_not_ordered_again(spec, situation, ahead):
    if situation.demand is None:
        return
    none_ready = replace(
        situation,
        starting=situation.replicas,
        waiting=situation.replicas * situation.capacity * 5,
        idle_since=None,
    )
    calm = replace(none_ready, waiting=0.0)
    assert size(spec, none_ready, ahead, NOW).replicas == size(spec, calm, ahead, NOW).replicas


@given(specs(), worlds(), st.floats(1, 1e6))
def test_the_last_replica_stays_while_work_arrives_whatever_is_said_of_idleness(spec, situation, rate):
    busy = replace(situation, replicas=1, demand=rate, idle_since=NOW - 1e4)
    assert size(spec, busy, None, NOW).replicas >= min(1, spec.most)
