"""Reports become rates; wrong ones do not."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_operator.autoscaling.model.samples import Distrust, MinuteRates, Report

START = 6000.0


def report(replica="a", at=START, **changes):
    return replace(Report(replica, at, started=100.0, arrived=0.0, completed=0.0), **changes)


def driven(rates, replicas, *, minutes=3, every_s=10.0, silent_after=math.inf):
    """Each replica gets 1 work a second."""
    for tick in range(int(minutes * 60 / every_s) + 1):
        for number in range(replicas):
            at = START + tick * every_s
            if number == 0 or at < START + silent_after:
                done = tick * every_s
                assert rates.observe(report(f"r{number}", at, arrived=done, completed=done)) is None
    return rates.close(START + minutes * 60, replicas)


def test_rates_of_whole_minutes_are_the_sum_over_replicas():
    minutes = driven(MinuteRates(), replicas=3)
    assert [minute.minute for minute in minutes] == [100, 101, 102]
    assert [minute.arrived for minute in minutes] == pytest.approx([180.0] * 3)


def test_a_silent_replica_is_taken_to_do_what_the_others_do():
    minutes = driven(MinuteRates(), replicas=2, silent_after=60)
    assert [minute.arrived for minute in minutes] == pytest.approx([120.0] * 3)


def test_with_most_replicas_silent_nothing_is_known():
    minutes = driven(MinuteRates(), replicas=4, silent_after=30)
    assert [minute.arrived is None for minute in minutes] == [False, True, True]


def test_a_minute_is_closed_once():
    rates = MinuteRates()
    driven(rates, replicas=1)
    assert rates.close(START + 181, 1) == []
    assert [minute.arrived for minute in rates.close(START + 241, 1)] == [None]


def test_work_of_a_worker_that_started_anew_counts_from_its_new_start():
    rates = MinuteRates()
    for at, started, arrived in [(0, 100, 500), (30, 100, 530), (40, START + 35, 0), (60, START + 35, 20)]:
        assert rates.observe(report(at=START + at, started=started, arrived=arrived)) is None
    (minute,) = rates.close(START + 60, 1)
    assert minute.arrived == pytest.approx(50 * 60 / 50)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"arrived": -1.0}, Distrust.NOT_A_NUMBER),
        ({"completed": math.nan}, Distrust.NOT_A_NUMBER),
        ({"waiting": math.inf}, Distrust.NOT_A_NUMBER),
        ({"started": START + 1000}, Distrust.FROM_THE_FUTURE),
        ({"arrived": 3.0}, Distrust.SUM_FELL),
        ({"arrived": 1e12}, Distrust.IMPLAUSIBLE),
        ({"at": START - 1}, Distrust.OUT_OF_ORDER),
    ],
)
def test_a_wrong_report_says_why_and_makes_no_jump(wrong, reason):
    rates = MinuteRates(plausible_rate=10_000)
    right = [report(at=START + 10 * tick, arrived=10.0 + 10 * tick) for tick in range(7)]
    for number, good in enumerate(right):
        assert rates.observe(good) is None
        if number == 2:
            assert rates.observe(replace(good, **{"at": good.at + 5, **wrong})) is reason
    (minute,) = rates.close(START + 60, 1)
    assert minute.arrived == pytest.approx(60.0)


numbers = st.floats() | st.sampled_from([0.0, 1.0, 60.0, 1e9])


@given(
    st.lists(st.builds(Report, st.sampled_from("ab"), numbers, numbers, numbers, numbers, numbers, numbers))
)
def test_whatever_is_reported_rates_are_rates(reports):
    rates = MinuteRates()
    for one in reports:
        if one.at < 1e7 or not math.isfinite(one.at):
            rates.observe(one)
    for minute in rates.close(1e7, 2):
        assert minute.arrived is None or minute.arrived >= 0
        assert 0 <= minute.late_share <= 1
