"""How many replicas there shall be, and who says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_operator.render import worker
from moe_operator.resources.scaling_status import ScalingStatus
from moe_operator.resources.status import READY, Status
from tests.operator.worlds import World, deployment, settled


def wanted(spec: dict[str, Any], **status: Any) -> int:
    return replace(deployment(**spec), status=Status(**status)).wanted_replicas


def auto(**scaling: Any) -> dict[str, Any]:
    return {"scaling": {"maxReplicas": 8, **scaling}}


@pytest.mark.parametrize(("spec", "count"), [({}, 1), ({"replicas": 0}, 0), ({"replicas": 5}, 5)])
def test_without_scaling_the_spec_decides(spec, count):
    assert wanted(spec, desired_replicas=3) == count


def test_with_scaling_the_last_decision_counts_within_todays_bounds():
    decided = ScalingStatus(desired_replicas=6)
    assert wanted(auto(), scaling=decided) == 6
    assert wanted(auto(maxReplicas=4), scaling=decided) == 4
    assert wanted(auto(minReplicas=7), scaling=decided) == 7


def test_scaling_starts_from_what_there_is_and_a_new_deployment_with_one_replica():
    assert wanted(auto(), desired_replicas=5) == 5
    assert wanted(auto(minReplicas=0)) == 1
    assert wanted(auto(minReplicas=2)) == 2


@pytest.mark.parametrize("mode", ["Advisory", "Off"])
def test_scaling_that_does_not_act_leaves_replicas_to_the_spec(mode):
    decided = ScalingStatus(desired_replicas=6)
    assert wanted({"replicas": 2, **auto(mode=mode)}, scaling=decided) == 2
    assert wanted(auto(mode=mode), scaling=decided, desired_replicas=3) == 1


@pytest.mark.parametrize(
    ("spec", "decided", "recorded"),
    [
        (auto(), 6, 6),
        (auto(minReplicas=0), 0, 0),
        (auto(), 1, None),
        ({"replicas": 6, **auto()}, 6, None),
        (auto(maxReplicas=4), 6, None),  # the scaler has yet to hear of the bound
        (auto(), None, None),
        (auto(mode="Advisory"), 6, None),
        (auto(mode="Off"), 6, None),
        ({"replicas": 2}, 6, None),
    ],
)
def test_what_scaling_decides_is_recorded_in_the_spec(spec, decided, recorded):
    status = Status(scaling=None if decided is None else ScalingStatus(desired_replicas=decided))
    assert replace(deployment(**spec), status=status).replicas_to_record == recorded


@pytest.mark.parametrize(("spec", "there"), [(auto(), 5), (auto(minReplicas=3), 3), (auto(minReplicas=0), 0)])
def test_replicas_stay_as_they_are_where_scaling_is_turned_off_before_it_decided(spec, there):
    """A manifest with scaling has no replicas: spec.replicas is 1 until the operator wrote it."""
    status = Status(desired_replicas=there)
    scaled = replace(deployment(**spec), status=status)
    assert (scaled.spec.replicas, scaled.wanted_replicas) == (1, there)
    off = {"scaling": {**spec["scaling"], "mode": "Off"}, "replicas": scaled.replicas_to_record}
    assert replace(deployment(**off), status=status).wanted_replicas == there


def test_a_reconcile_neither_writes_nor_removes_what_the_scaler_reports():
    world = settled()
    world.deployment = replace(
        world.deployment, status=world.status.model_copy(update={"scaling": ScalingStatus()})
    )
    assert world.planned().status.scaling is None
    assert world.planned().status == world.status.without_scaling()


def test_zero_replicas_by_scaling_promise_that_a_request_brings_one():
    world = World(deployment(**auto(minReplicas=0)))
    decided = world.status.model_copy(update={"scaling": ScalingStatus(desired_replicas=0)})
    world.deployment = replace(world.deployment, status=decided)
    ready = world.step().status.condition(READY)
    assert (ready.status, ready.reason) == ("False", "FrontendNotReady"), "nobody would hold a request"
    world.frontend_ready()
    ready = world.step().status.condition(READY)
    assert (ready.reason, "the next one is held" in ready.message) == ("ScaledToZero", True)


def test_half_a_gpu_is_a_piece_of_its_resource():
    half = deployment(
        worker={
            "acceleratorPercentage": 50,
            "acceleratorResource": "nvidia.com/gpu.shared",
            "resources": {"limits": {"memory": "8Gi"}},
        }
    )
    limits = worker.pod_spec(half)["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "8Gi", "nvidia.com/gpu.shared": 1}
    assert half.spec.worker.gpus == 0.5
    assert deployment(worker={"resources": {"limits": {"nvidia.com/gpu": 8}}}).spec.worker.gpus == 8


def test_a_replica_that_scaling_adds_is_no_surprise():
    world = World(deployment(**auto()))
    world.step()
    world.ready(0)
    world.frontend_ready()
    world.step()
    decided = world.status.model_copy(update={"scaling": ScalingStatus(desired_replicas=2)})
    world.deployment = replace(world.deployment, status=decided)
    told = [decision.reason for decision in world.step().decisions]
    assert "Created" in told
    assert "Recreated" not in told
