"""The forecaster on demand whose nature is known."""

import math
import os
import subprocess
import sys
import warnings
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tsa.arima.model import ARIMA
from statsmodels.tsa.exponential_smoothing.ets import ETSModel

from moe_operator.autoscaling.model.forecast import filters
from moe_operator.autoscaling.model.forecast.combination import Combination
from moe_operator.autoscaling.model.forecast.features import Features, level_steps
from moe_operator.autoscaling.model.forecast.forecaster import CANDIDATES, Forecaster
from moe_operator.autoscaling.model.forecast.past import Past
from moe_operator.autoscaling.model.forecast.residuals import Residuals
from moe_operator.autoscaling.model.history import History

TEN_MINUTES = 600.0
DAY = 144


def walk(steps=400, seed=0):
    chance = np.random.default_rng(seed)
    return 1000 * np.exp(np.cumsum(chance.normal(0, 0.03, steps)) + chance.normal(0, 0.05, steps))


def past_of(rates, day=DAY, horizon=1):
    past = Past(day, level_steps(horizon))
    for step, rate in enumerate(rates):
        past.append(step, rate)
    return past


def driven(rates, horizon=1, step_s=TEN_MINUTES, start=0, refit_every=100):
    """Forecasts by the step that they are for; refits are rare, for they are what costs time."""
    forecaster = Forecaster(horizon, step_s)
    made, patience = {}, 0
    for step, rate in enumerate(rates, start):
        forecaster.update(step, rate)
        patience -= 1
        if forecaster.refit_due and patience <= 0:
            forecaster.adopt(forecaster.refit_job()())
            patience = refit_every
        made[step + horizon] = forecaster.forecast()
    return made, forecaster


def wape(rates, made, scored, *, last_value=0):
    errors = [
        abs(rates[step] - (rates[step - last_value] if last_value else made[step].mean)) for step in scored
    ]
    return sum(errors) / sum(rates[step] for step in scored)


@pytest.mark.parametrize("horizon", [1, 5])
def test_weights_forecast_what_statsmodels_forecasts(horizon):
    rates = walk()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smoothing = filters.exponential_smoothing(rates, horizon)
        ets = ETSModel(rates, error="add", trend="add", damped_trend=True).fit(disp=False)
        logs = np.log(rates) - np.log(rates).mean()
        errors = filters.best_arima(logs, [(1, 1, 1)], horizon)
        arima = ARIMA(logs, order=(1, 1, 1), trend="n").fit()
    assert smoothing @ rates[-len(smoothing) :] == pytest.approx(ets.forecast(horizon)[-1], rel=2e-3)
    assert errors @ logs[-len(errors) :] == pytest.approx(arima.forecast(horizon)[-1], abs=2e-3)


@pytest.mark.parametrize("horizon", [15, 60, 240])
def test_a_long_horizon_is_forecast_from_the_first_fit_on(horizon):
    """After an hour, moving averages have too few rates for 15 minutes and more, and other models do not."""
    rates = walk(150)
    made, _ = driven(rates, horizon, step_s=60.0, refit_every=40)
    assert len(made) == len(rates)
    for forecast in made.values():
        assert np.isfinite([value for _, value in forecast.quantiles]).all()
        assert 0 < forecast.mean < 20 * max(rates)


@pytest.mark.parametrize("horizon", [1, 5])
def test_features_of_one_step_are_those_of_the_same_step_among_all(horizon):
    rates = walk(9 * DAY)
    whole = Features.of(past_of(rates, horizon=horizon), horizon, len(rates))
    for end in (DAY // 2, 2 * DAY, len(rates)):
        one = Features.of(past_of(rates[:end], horizon=horizon), horizon, 1)
        for name in ("mean_level", "median_level", "smoothed", "slopes", "seasons", "harmonics"):
            np.testing.assert_allclose(
                getattr(one, name)[0], getattr(whole, name)[end - 1], rtol=2e-3, atol=2.0
            )


@given(st.lists(st.tuples(st.integers(1, 4), st.none() | st.floats(0, 1e6)), min_size=1, max_size=200))
def test_the_past_is_what_was_appended_however_long_it_grows(changes):
    past, kept, step = Past(day=2, level=3), deque(maxlen=28), 0
    for count, (forward, rate) in enumerate(changes):
        kept.extend([None] * (forward - 1 if count else 0))
        step += forward
        kept.append(rate)
        past.append(step, rate)
    assert past.end == step + 1
    assert len(past) == len(kept)
    for mine, known, theirs in zip(past.rates, past.known, kept, strict=True):
        assert known == (theirs is not None)
        assert theirs is None or mine == theirs


def test_residuals_of_noise_cover_what_they_promise():
    chance, residuals, inside = np.random.default_rng(3), Residuals(), 0
    for step in range(4000):
        size = 50 if step % 1000 < 500 else 150  # restless and calm in turn
        error = chance.standard_t(4) * size
        (upper,) = residuals.quantiles((0.9,))
        scale = residuals.scale
        inside += error <= 1000 * upper and step >= 200
        residuals.observe(error, 1000.0, scale)
    assert inside / 3800 == pytest.approx(0.9, abs=0.015)


def test_the_combination_is_close_to_the_best_candidate_and_follows_a_change():
    chance = np.random.default_rng(4)
    combination, losses = Combination((0.5,), 3), np.zeros(4)
    for step in range(3000):
        outcome = 100 + chance.normal(0, 1)
        good = 100.0 if step < 1500 else 130.0
        forecasts = np.array([[good, 230.0 - good, 160.0]])
        opinions = combination.opinions(forecasts)
        combined = opinions.mean(axis=0)
        if step % 1500 >= 500:
            losses += [*np.abs(forecasts[0] - outcome), abs(combined[0] - outcome)]
        combination.observe(outcome, forecasts, opinions, 100.0)
    assert losses[3] < 0.25 * losses[:3].min(), "the best changed, so none of them alone is good"


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_constant_demand_is_forecast_as_it_is_without_a_warning():
    made, _ = driven([500.0] * 300)
    last = made[300]
    assert last.mean == pytest.approx(500.0)
    assert last.quantile(0.95) == pytest.approx(500.0, rel=0.01)


def test_a_daily_season_is_learned_when_there_is_one():
    chance, steps = np.random.default_rng(5), np.arange(7 * DAY)
    rates = 1000 * (1 + 0.8 * np.sin(2 * np.pi * steps / DAY)) * np.exp(chance.normal(0, 0.03, len(steps)))
    horizon = 6
    made, _ = driven(rates, horizon, refit_every=50)
    scored = range(3 * DAY, 7 * DAY)
    assert wape(rates, made, scored) < 0.3 * wape(rates, made, scored, last_value=horizon)
    upper = np.mean([rates[step] <= made[step].quantile(0.9) for step in scored])
    assert 0.86 <= upper <= 0.94


def test_without_a_season_noise_is_averaged_and_no_more():
    chance = np.random.default_rng(6)
    rates = chance.poisson(200, 5 * DAY).astype(float)
    made, _ = driven(rates)
    scored = range(DAY, 5 * DAY)
    best = sum(abs(rates[step] - 200) for step in scored) / sum(rates[step] for step in scored)
    assert wape(rates, made, scored) < 1.06 * best


def test_a_level_shift_is_followed_within_an_hour_or_two():
    chance = np.random.default_rng(7)
    rates = np.concatenate([chance.poisson(200, 300), chance.poisson(1000, 60)]).astype(float)
    made, _ = driven(rates)
    assert made[312].mean == pytest.approx(1000, rel=0.25)
    assert made[340].mean == pytest.approx(1000, rel=0.1)


def test_after_an_outage_demand_is_expected_back_as_soon_as_it_is():
    chance = np.random.default_rng(8)
    rates = np.concatenate([chance.poisson(500, 300), np.zeros(20), chance.poisson(500, 20)]).astype(float)
    made, _ = driven(rates)
    assert made[315].mean < 50
    assert made[324].mean == pytest.approx(500, rel=0.25)


def test_bursts_from_nowhere_are_expected_as_large_as_they_were():
    chance = np.random.default_rng(13)
    rates = np.where(chance.random(300) < 0.5, 0.0, chance.uniform(0, 600, 300))
    made, _ = driven(rates, 5, 60.0)
    highest = np.quantile(rates, 0.9)
    for step in range(200, 300):
        assert made[step].quantile(0.9) <= 1.4 * highest
        assert made[step].quantile(0.999) <= 1.25 * rates.max()
    above = np.mean([rates[step] > made[step].quantile(0.9) for step in range(100, 300)])
    assert above <= 0.15


def test_nights_near_zero_give_no_negative_and_no_absurd_rates():
    chance, steps = np.random.default_rng(9), np.arange(5 * DAY)
    rates = chance.poisson(np.maximum(0, 50 * np.sin(2 * np.pi * steps / DAY))).astype(float)
    made, _ = driven(rates)
    for forecast in made.values():
        assert 0 <= forecast.mean <= 200
        values = [rate for _, rate in forecast.quantiles]
        assert values == sorted(values)
        assert values[0] >= 0


def test_gaps_and_wrong_rates_are_unknown_and_change_little():
    chance = np.random.default_rng(10)
    rates = [float(rate) for rate in chance.poisson(300, 400)]
    _, forecaster = driven(rates)
    for step, wrong in enumerate([None, math.nan, -5.0, math.inf, None], 400):
        forecaster.update(step, wrong)
    forecaster.update(450, 310.0)
    forecaster.update(430, 1e9)
    made = forecaster.forecast()
    assert made.at == 451 * TEN_MINUTES
    assert made.mean == pytest.approx(300, rel=0.1)


def test_before_any_rate_there_is_no_forecast_and_then_it_is_the_last_value():
    forecaster = Forecaster(5)
    assert forecaster.forecast() is None
    forecaster.update(100, None)
    assert forecaster.forecast() is None
    forecaster.update(101, 60.0)
    made = forecaster.forecast()
    assert (made.mean, made.method, made.at) == (pytest.approx(60.0), "last value", 106 * 60)
    assert made.quantile(0.95) > 60
    assert made.errors.trustworthy


@settings(max_examples=20, deadline=None)
@given(st.lists(st.none() | st.floats(0, 1e9) | st.floats(), min_size=1, max_size=150), st.integers(1, 12))
def test_whatever_comes_quantiles_are_rates_in_order_and_the_same_again(rates, horizon):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy on rates of 1e300
        first, _ = driven(rates, horizon)
        again, _ = driven(rates, horizon)
    for step, forecast in first.items():
        assert forecast == again[step]
        if forecast is not None:
            values = [rate for _, rate in forecast.quantiles]
            assert all(math.isfinite(value) and value >= 0 for value in values)
            assert values == sorted(values)


def test_a_restored_forecaster_goes_on_where_the_old_one_was():
    chance, minutes = np.random.default_rng(11), np.arange(1440 + 720)
    rates = (
        600 * (1 + 0.5 * np.sin(2 * np.pi * minutes / 1440)) * np.exp(chance.normal(0, 0.05, len(minutes)))
    )
    history = History()
    for minute, rate in enumerate(rates, 29_000_000):
        history.add(minute, float(rate))
    _, forecaster = driven(rates, 5, 60.0, start=29_000_000, refit_every=500)
    restored = Forecaster.restored(History.load(history.dump()), 5).forecast()
    before = forecaster.forecast()
    assert restored.at == before.at
    assert restored.mean == pytest.approx(before.mean, rel=0.05)
    assert restored.quantile(0.95) == pytest.approx(before.quantile(0.95), rel=0.1)
    assert restored.errors.wape == pytest.approx(before.errors.wape, rel=0.2)


def test_the_candidates_that_users_asked_for_are_there():
    for name in ("last value", "moving average", "Holt-Winters", "harmonic regression with ARIMA errors"):
        assert name in CANDIDATES
    assert any(name.startswith("direct regression") for name in CANDIDATES)


def test_forecasts_use_one_thread():
    """The threads of BLAS wait for one another in a loop: they cost CPU time and save none."""
    module = "moe_operator.autoscaling.model.forecast.forecaster"
    code = f"import os, {module}; print(len(os.listdir('/proc/self/task')))"
    environment = {name: value for name, value in os.environ.items() if "THREADS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


def test_an_operator_starts_without_the_forecaster():
    """statsmodels takes twice as long to import as everything else; most operators scale nothing."""
    code = "import sys, moe_operator.main; print(sys.modules.keys() & {'scipy', 'statsmodels', 'pandas'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
