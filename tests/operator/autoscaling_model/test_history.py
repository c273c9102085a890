"""What is stored comes back, and is small."""

import base64
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_operator.autoscaling.model.history import MINUTES, History, HistoryError

rates = st.none() | st.floats(0, 1e15) | st.sampled_from([math.nan, math.inf, -1.0])
steps = st.lists(st.tuples(st.integers(1, 5), rates), max_size=200)


def filled(minutes, values):
    history = History()
    for minute, rate in zip(minutes, values, strict=True):
        history.add(minute, rate)
    return history


@given(st.integers(0, 1 << 40), steps)
def test_rates_come_back_to_within_a_thousandth(start, changes):
    minutes = start + np.cumsum([step for step, _ in changes], dtype=int)
    history = filled(minutes.tolist(), [rate for _, rate in changes])
    read = History.load(history.dump())
    assert list(read.items()) == list(history.items())
    back = dict(read.items())
    for minute, (_, rate) in zip(minutes.tolist(), changes, strict=True):
        if rate is None or not math.isfinite(rate) or rate < 0:
            assert back[minute] is None
        else:
            assert back[minute] == pytest.approx(rate, rel=0.0006, abs=1e-6)
    assert sum(rate is not None for rate in back.values()) <= len(changes), "gaps stay gaps"


def test_fourteen_days_of_noise_take_less_than_100_kib():
    chance = np.random.default_rng(0)
    worst = filled(range(MINUTES + 5), np.exp(chance.uniform(-10, 40, MINUTES + 5)).tolist())
    assert len(worst) == MINUTES
    assert len(worst.dump()) <= 72 * 1024
    usual = filled(range(MINUTES), chance.poisson(1000, MINUTES).astype(float).tolist())
    assert len(usual.dump()) <= 40 * 1024


def test_minutes_that_went_by_are_not_rewritten():
    history = filled([10, 12], [1.0, 2.0])
    history.add(11, 5.0)
    assert [minute for minute, _ in history.items()] == [10, 11, 12]
    assert dict(history.items())[11] is None


@pytest.mark.parametrize("damage", ["", "!!!", "AAAA", base64.b64encode(b"\x02" + bytes(20)).decode()])
def test_what_is_damaged_says_so(damage):
    with pytest.raises(HistoryError, match=r"^rates: ."):
        History.load(damage)


@given(st.integers(0, 40), st.integers(0, 255))
def test_any_changed_byte_is_an_error_or_other_rates_but_nothing_else(position, byte):
    raw = bytearray(base64.b64decode(filled(range(50), [7.0] * 50).dump()))
    raw[position % len(raw)] = byte
    try:
        read = History.load(base64.b64encode(bytes(raw)).decode())
    except HistoryError:
        return
    assert len(read) <= MINUTES
