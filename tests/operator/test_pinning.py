"""What a newer operator leaves alone: pods, until somebody edits what makes them."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_operator.render import frontend, worker
from moe_operator.render.objects import Key, key
from moe_operator.resources import names
from tests.operator.worlds import deployment, settled


@pytest.fixture
def upgrade(monkeypatch):
    """Puts a newer operator in place, which renders other pods."""

    def later():
        probe = {**worker._LIVENESS_PROBE, "failureThreshold": 7}
        monkeypatch.setattr(worker, "_LIVENESS_PROBE", probe)
        probes = frontend._probes
        monkeypatch.setattr(frontend, "_probes", lambda port: {**probes(port), "livenessProbe": probe})

    return later


def threshold(world, rank):
    spec = world.children[Key("StatefulSet", f"docs-{rank}")]["spec"]["template"]["spec"]
    return spec["containers"][0]["livenessProbe"]["failureThreshold"]


def test_a_newer_operator_writes_nothing(upgrade):
    world = settled()
    upgrade()
    plan = world.step()
    assert (plan.apply, plan.delete, plan.decisions) == ((), (), ())
    assert plan.status.revision == world.status.revision


def test_a_new_replica_is_like_its_siblings(upgrade):
    world = settled()
    upgrade()
    world.change(replicas=3)
    assert [key(manifest).name for manifest in world.step().apply] == ["docs-2"]
    assert len(set(world.revisions().values())) == 1
    assert threshold(world, 2) == threshold(world, 0) == 3


def test_an_edit_brings_the_newer_rendering_with_its_new_replicas(upgrade):
    world = settled()
    upgrade()
    world.change(engine={"maxBatchSize": 4})
    world.step()
    assert [threshold(world, rank) for rank in (0, 1, 2)] == [3, 3, 7]
    for _ in range(4):
        world.all_ready()
        world.step()
    assert [threshold(world, rank) for rank in world.revisions()] == [7, 7]


def test_an_edit_that_is_taken_back_brings_the_old_rendering_back(upgrade):
    world = settled()
    before = world.revisions()[1]
    upgrade()
    world.change(engine={"maxBatchSize": 4})
    world.step()
    world.change(engine={"maxBatchSize": 16})
    world.step()
    assert world.revisions() == {0: before, 1: before}


def test_an_edit_of_the_frontend_restarts_no_worker(upgrade):
    world = settled()
    upgrade()
    world.change(frontend={"image": "example.org/frontend:2"})
    assert [key(manifest).name for manifest in world.step().apply] == ["docs-frontend"]


def test_a_replica_that_was_deleted_comes_back_as_it_was(upgrade):
    world = settled()
    before = world.revisions()
    upgrade()
    del world.children[Key("StatefulSet", "docs-1")]
    world.step()
    assert sorted(world.revisions().values()) == sorted(before.values())


def test_a_field_that_came_with_the_upgrade_is_no_edit():
    """The CRD of then had no engine.dtype; today's brings it with its default."""
    world = settled()
    for child in world.children.values():
        text = child["metadata"]["annotations"].get(names.ANNOTATION_PINNED)
        if text:
            pin = json.loads(text)
            del pin["spec"]["engine"]["dtype"]
            pin["template"]["spec"]["containers"][0]["env"] = []
            child["metadata"]["annotations"][names.ANNOTATION_PINNED] = json.dumps(pin)
    before = world.revisions()
    world.step()
    world.change(replicas=3)
    world.step()
    assert world.revisions()[2] != worker.revision(deployment())
    assert before.keys() < world.revisions().keys()


@pytest.mark.parametrize("devices", [{}, {"limits": {"nvidia.com/gpu": 1}}], ids=["cpu", "gpu"])
def test_defaults_that_an_earlier_crd_wrote_hold_until_somebody_removes_them(devices):
    """The CRD of 0.1.0 wrote them into every object; without them GPUs have others."""
    world = settled(engine={"maxBatchSize": 16, "kvMemory": "512Mi"}, worker={"resources": devices})
    assert world.step().apply == ()
    world.change(engine={})
    rolled = [one["spec"]["template"] for one in world.step().apply if one["kind"] == "StatefulSet"]
    assert bool(rolled) == bool(devices)
    assert all("256" in template["spec"]["containers"][0]["command"] for template in rolled)


@settings(deadline=None)
@given(
    st.sampled_from(["", "{}", "null", "[1]", '{"spec": {}, "template": {"spec": {}, "metadata": {}}}'])
    | st.just("[" * 200_000)
    | st.text()
)
def test_an_annotation_that_somebody_edited_is_put_right_and_restarts_nothing(text):
    world = settled()
    before = world.revisions()
    broken = copy.deepcopy(world)
    for child in broken.children.values():
        if names.ANNOTATION_PINNED in child["metadata"]["annotations"]:
            child["metadata"]["annotations"][names.ANNOTATION_PINNED] = text
    broken.step()
    assert broken.revisions() == before
    assert broken.children == world.children
