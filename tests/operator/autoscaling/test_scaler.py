"""One deployment's scaling as its user sees it: ramps, silence, wrong reports, zero and a new process."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator.autoscaling.simulated import Simulation, minutes

SPEC = {"minReplicas": 1, "maxReplicas": 10, "priorRequestsPerSecond": 2.0}


def settled(spec=SPEC, rate=1.0, **options):
    world = Simulation(spec, **options)
    world.run(minutes(90, rate))
    return world


def test_replicas_rise_with_a_ramp_and_fall_after_it():
    world = settled()
    assert len(world.replicas) == 1
    ramp = [1.0 + 7.0 * step / 120 for step in range(120)]
    up = world.run(ramp)
    assert up[-1] >= 5
    high = world.run(minutes(20, 8.0))
    assert min(high) >= 5
    down = world.run(minutes(60, 1.0))
    assert down[0] == high[-1]
    assert down[-1] <= 2


def test_a_falling_load_does_not_take_replicas_at_once():
    world = settled(rate=8.0)
    before = len(world.replicas)
    assert set(world.run(minutes(4, 1.0))) == {before}


def test_a_replica_that_becomes_ready_within_a_minute_is_no_reason_to_see_more_demand():
    world = settled(rate=3.0, start_s=90)
    world.run(minutes(30, 9.0))
    seen = [outcome.demand for outcome in world.outcomes if outcome.demand is not None]
    assert max(seen) == pytest.approx(540, rel=0.05)


def test_a_queue_that_is_left_on_one_replica_says_nothing_of_capacity():
    world = settled(start_s=240)
    world.run(minutes(30, 8.0))
    assert world.outcomes[-1].capacity.per_replica == pytest.approx(120, rel=0.1)


def test_a_replica_that_starts_does_not_dilute_the_demand():
    """Its report says that nothing arrived there, which is true, and says nothing of the deployment."""
    world = settled(rate=3.0, start_s=300)
    world.run(minutes(5, 3.0))
    assert world.outcomes[-1].demand == pytest.approx(180, rel=0.05)


@pytest.mark.parametrize(
    ("spoiled", "sentence"),
    [
        ({"arrived": -5.0}, "contains NaN, infinity or a negative number"),
        ({"arrived": math.nan}, "contains NaN, infinity or a negative number"),
        ({"completed": math.inf}, "contains NaN, infinity or a negative number"),
        ({"started": 4e9}, "its clock is wrong"),
        ({"arrived": 1e15, "completed": 1e15}, "more work than a replica can get"),
    ],
)
def test_a_wrong_report_makes_scaling_reactive_with_a_reason_and_never_jump(spoiled, sentence):
    world = settled(rate=3.0)
    before = len(world.replicas)
    world.spoil = lambda report: replace(report, **spoiled) if report.replica == "docs-0-0" else report
    world.round(3.0)
    verdict, _ = world.told
    assert (verdict.holds, verdict.reason) == (True, "Reactive")
    assert "docs-0-0: its report" in verdict.message
    assert sentence in verdict.message
    assert "the forecast is not used while reports are invalid" in verdict.message
    assert set(world.run(minutes(2, 3.0))) == {before}
    world.spoil = lambda report: report
    after = world.run(minutes(6, 3.0))
    assert before <= min(after) <= max(after) <= before + 1
    assert world.told[0].reason != "ReportsUnusable"


def test_what_waits_at_a_replica_that_reports_nonsense_orders_no_replica():
    world = settled(rate=3.0)
    before = len(world.replicas)
    world.spoil = lambda report: replace(report, arrived=1e15, waiting=4e9)
    assert set(world.run(minutes(1, 3.0))) == {before}


def test_a_new_replica_cannot_have_done_more_than_any_could_since_it_started():
    world = Simulation(SPEC)
    world.spoil = lambda report: replace(report, arrived=1e12, completed=0.0, waiting=4e9)
    world.run(minutes(5, 1.0))
    assert len(world.replicas) == 1
    assert "more work than a replica can get" in world.told[0].message


def test_sums_that_fell_are_left_out():
    world = settled(rate=3.0)
    before = len(world.replicas)
    world.spoil = lambda report: replace(report, arrived=report.arrived / 2)
    world.round(3.0)
    assert "sums that decreased" in world.told[0].message
    assert len(world.replicas) == before


def test_when_nobody_reports_replicas_stay_and_the_condition_says_so():
    world = settled(rate=5.0)
    before = len(world.replicas)
    world.spoil = lambda report: None
    counts = world.run(minutes(30, 50.0))
    assert set(counts) == {before}
    verdict, _ = world.told
    assert (verdict.holds, verdict.reason) == (False, "ReportsUnusable")
    assert "docs-0-0 does not report its load" in verdict.message


def test_one_silent_replica_is_taken_to_do_what_the_others_do():
    world = settled(rate=6.0)
    before = len(world.replicas)
    assert before >= 4
    world.spoil = lambda report: None if report.replica == "docs-1-0" else report
    assert set(world.run(minutes(20, 6.0))) == {before}
    assert world.outcomes[-1].demand == pytest.approx(360, rel=0.1)
    assert "docs-1-0 does not report" in world.told[0].message


def test_a_new_process_goes_on_with_what_was_kept():
    world = settled(rate=6.0)
    before, forecast = len(world.replicas), world.outcomes[-1].forecast
    world.memory = world.scaler.memory()
    world.restart()
    assert set(world.run(minutes(10, 6.0))) == {before}
    assert len(world.scaler.memory().history) >= 40
    assert world.outcomes[0].forecast is None
    assert world.outcomes[-1].forecast.mean == pytest.approx(forecast.mean, rel=0.05)
    starts = world.scaler.memory().cold_starts.seconds
    assert len(starts) == len(world.memory.cold_starts.seconds), "no cold start counts twice"


def test_only_pods_that_exist_are_remembered_as_measured():
    world = settled(rate=9.0, start_s=60)
    most = len(world.replicas)
    world.run(minutes(60, 1.0))
    assert len(world.replicas) < most
    assert world.scaler.memory().measured == world.subject().uids


def test_a_measured_pod_that_is_not_ready_for_a_moment_stays_measured():
    world = settled(start_s=60)
    world.start_s = math.inf
    world.round(1.0)
    found = world.subject()
    assert found.ready == ()
    assert world.scaler.memory().measured == found.uids != frozenset()


def test_the_horizon_becomes_what_was_measured():
    world = settled(rate=9.0, start_s=130.0)
    assert world.outcomes[0].cold_starts.horizon_s == 300
    assert world.outcomes[-1].cold_starts.horizon_s == 130
    assert world.status.horizon.cold_starts >= 5
    started = world.status.last_cold_start
    assert (started.scheduling, started.image, started.loading, started.total) == (1, 1, 128, 130)


def test_advice_changes_nothing_and_says_what_it_would_have_done():
    world = Simulation({**SPEC, "mode": "Advisory"})
    world.run(minutes(10, 1.0))
    told = []
    for rate in minutes(20, 8.0):
        world.round(rate)
        told.append(world.told[1])
    assert len(world.replicas) == 1
    first = next(decision for decision in told if decision)
    assert first.reason == "ScalingAdvised"
    assert "would scale from 1 to " in first.message
    assert world.status.desired_replicas >= 5
    assert world.told[0].reason == "Advisory"


ZERO = {"minReplicas": 0, "maxReplicas": 4, "priorRequestsPerSecond": 2.0}


def test_without_requests_the_last_replica_goes_and_the_first_request_brings_one():
    world = Simulation(ZERO)
    world.run(minutes(10, 1.0))
    assert len(world.replicas) == 1
    world.run(minutes(25, 0.0))
    assert len(world.replicas) == 0
    assert (world.status.last_decision.reason, world.status.last_decision.after) == ("Idle", 0)
    world.run(minutes(10, 0.0))
    assert len(world.replicas) == 0
    world.held = 1
    world.round(0.0)
    assert len(world.replicas) == 1
    assert world.status.last_decision.reason == "FirstRequest"
    world.run(minutes(2, 0.0))
    world.held = 0
    world.run(minutes(5, 0.2))
    assert len(world.replicas) >= 1


def test_a_new_deployment_that_nobody_asks_rests_too():
    world = Simulation(ZERO)
    world.run(minutes(20, 0.0))
    assert len(world.replicas) == 0


def test_the_limit_in_halves_of_a_gpu_is_kept():
    world = Simulation({**SPEC, "gpuLimit": "1500m"})
    half = {"accelerator_percentage": 50, "accelerator_resource": "nvidia.com/gpu.shared"}
    worker = world.deployment.spec.worker.model_copy(update=half)
    spec = world.deployment.spec.model_copy(update={"worker": worker})
    world.deployment = replace(world.deployment, spec=spec)
    world.run(minutes(20, 50.0))
    assert len(world.replicas) == 3
    assert "GPUs" in world.told[0].message


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 40), min_size=20, max_size=60), st.integers(0, 2), st.data())
def test_whatever_is_reported_replicas_stay_within_the_bounds(rates, least, data):
    world = Simulation({"minReplicas": least, "maxReplicas": 5, "priorRequestsPerSecond": 1.0}, start_s=60)
    numbers = st.sampled_from([-1.0, math.nan, math.inf, 0.0, 1e18])

    def spoil(report):
        if data.draw(st.booleans()):
            return replace(
                report, **{data.draw(st.sampled_from(["arrived", "started", "late"])): data.draw(numbers)}
            )
        return report if data.draw(st.booleans()) else None

    world.spoil = spoil
    for rate in rates:
        world.round(rate)
        assert least <= len(world.replicas) <= 5


def test_constant_demand_gives_a_constant_number():
    world = settled(rate=5.0)
    assert len(set(world.run(minutes(120, 5.0)))) == 1
