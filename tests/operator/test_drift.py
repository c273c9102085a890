"""The plan and what others did to the objects: drift, whose an object is, what is compared again."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from moe_operator.observed import children
from moe_operator.planner.pinning import with_pins
from moe_operator.planner.plan import Plan, plan
from moe_operator.render.objects import Key, key
from moe_operator.render.worker import recipe
from moe_operator.resources.deployment import Identity
from moe_operator.resources.status import READY
from tests.operator.worlds import World, deployment, settled


def test_drift_of_a_field_is_corrected_with_a_warning():
    world = settled()
    world.children[Key("StatefulSet", "docs-1")]["spec"]["replicas"] = 5
    plan = world.step()
    assert [key(manifest).name for manifest in plan.apply] == ["docs-1"]
    (decision,) = (found for found in plan.decisions if found.reason == "DriftCorrected")
    assert decision.warning
    assert "StatefulSet docs-1: spec.replicas" in decision.message


def test_a_deleted_child_is_recreated_with_a_warning():
    world = settled()
    del world.children[Key("Service", "docs-workers")]
    plan = world.step()
    assert [key(manifest) for manifest in plan.apply] == [Key("Service", "docs-workers")]
    assert "Recreated" in [decision.reason for decision in plan.decisions]


def test_defaults_and_fields_of_others_are_no_difference():
    world = settled()
    child = world.children[Key("StatefulSet", "docs-0")]
    child["spec"]["persistentVolumeClaimRetentionPolicy"] = {"whenDeleted": "Retain"}
    child["metadata"]["annotations"]["someone.else/note"] = "hello"
    assert world.step().apply == ()


def test_an_amount_in_another_spelling_is_no_difference():
    world = settled(worker={"resources": {"requests": {"cpu": "0.5", "memory": 1073741824}}})
    pod = world.children[Key("StatefulSet", "docs-0")]["spec"]["template"]["spec"]
    pod["containers"][0]["resources"]["requests"] = {"cpu": "500m", "memory": "1Gi"}
    assert world.step().apply == ()
    pod["containers"][0]["resources"]["requests"]["cpu"] = "600m"
    assert len(world.step().apply) == 1


def test_objects_of_others_are_never_touched():
    world = World(deployment(replicas=2))
    name = Key("StatefulSet", "docs-1")
    world.children[name] = {"kind": "StatefulSet", "metadata": {"name": "docs-1", "uid": "other"}, "spec": {}}
    plan = world.step()
    assert [key(manifest).name for manifest in plan.apply if manifest["kind"] == "StatefulSet"] == [
        "docs-0",
        "docs-2",
    ]
    world.change(replicas=1)
    assert [deletion.key.name for deletion in world.step().delete] == ["docs-2"]


def test_a_child_whose_owner_was_taken_away_is_adopted_without_a_restart():
    world = settled()
    before = world.revisions()
    for name in (Key("Service", "docs-workers"), Key("StatefulSet", "docs-1")):
        del world.children[name]["metadata"]["ownerReferences"]
    plan = world.step()
    assert {change.message for change in plan.decisions if change.reason == "DriftCorrected"} == {
        "Service docs-workers: metadata.ownerReferences was changed by another client; drift corrected",
        "StatefulSet docs-1: metadata.ownerReferences was changed by another client; drift corrected",
    }
    assert world.step().apply == ()
    assert (world.revisions(), world.condition(READY).status) == (before, "True")


def test_a_child_that_another_object_controls_is_left_alone():
    world = settled()
    name = Key("Service", "docs-workers")
    world.children[name]["metadata"]["ownerReferences"] = [{"uid": "another", "controller": True}]
    assert world.step().apply == ()
    assert world.condition(READY).reason == "NameConflict"


def planned_with(world: World, verdicts: dict[Key, str]) -> Plan:
    observed = world.observed(model=world.model, verdicts=verdicts)
    return plan(with_pins(world.deployment, observed), observed, world.now)


def test_what_an_earlier_reconcile_found_changes_no_plan_until_something_else_is_wanted():
    world = settled(replicas=3)
    first = planned_with(world, {})
    assert first.sound == tuple(Key("StatefulSet", f"docs-{rank}") for rank in range(3))
    verdicts = dict.fromkeys(first.sound, recipe(with_pins(world.deployment, world.observed())))
    again = planned_with(world, verdicts)
    assert (again.sound, again.apply, again.status) == ((), first.apply, first.status)
    for edit in ({"engine": {"maxBatchSize": 7}}, {"replicas": 1}, {"worker": {"resources": {}}}):
        world.change(**edit)
        fresh = planned_with(world, {})
        assert dataclasses.replace(planned_with(world, verdicts), sound=()) == dataclasses.replace(
            fresh, sound=()
        )


def test_a_stateful_set_that_is_not_as_it_should_be_is_not_called_sound():
    world = settled(replicas=2)
    world.children[Key("StatefulSet", "docs-1")]["spec"]["serviceName"] = "another"
    found = planned_with(world, {})
    assert found.sound == (Key("StatefulSet", "docs-0"),)
    assert [key(manifest) for manifest in found.apply] == [Key("StatefulSet", "docs-1")]


def orphan_of(world: World, kind: str, name: str) -> Key:
    """Takes the owner away, as `kubectl delete --cascade=orphan` does; returns the object's key."""
    found = Key(kind, name)
    del world.children[found]["metadata"]["ownerReferences"]
    return found


def belongs(manifest: dict[str, Any], owner: Identity) -> bool:
    return children.read(manifest).belongs_to(owner)


def test_an_orphan_is_adopted_where_its_labels_and_its_name_are_those_that_we_give():
    world = settled(replicas=1)
    owner = world.deployment.identity
    for found in [*world.children]:
        orphan = world.children[orphan_of(world, *found)]
        assert belongs(orphan, owner), found
        labels, metadata = orphan["metadata"]["labels"], orphan["metadata"]
        assert not belongs({**orphan, "metadata": {**metadata, "name": "another"}}, owner), found
        for label in ("app.kubernetes.io/managed-by", "serving.moe-operator.dev/name"):
            others = {**labels, label: "another"}
            assert not belongs({**orphan, "metadata": {**metadata, "labels": others}}, owner), found


def test_an_orphan_of_another_name_is_never_counted_as_a_replica():
    world = settled(replicas=1)
    copied = copy.deepcopy(world.children[orphan_of(world, "StatefulSet", "docs-0")])
    copied["metadata"]["name"] = "copied"
    world.children[Key("StatefulSet", "copied")] = copied
    world.change(replicas=0)
    assert [deletion.key.name for deletion in world.step().delete] == ["docs-0"]


def test_objects_of_a_deleted_deployment_of_the_same_name_are_waited_for_and_no_conflict():
    world = settled(replicas=1)
    again = World(dataclasses.replace(deployment(replicas=1), identity=Identity("default", "docs", "new", 1)))
    again.children, again.pods = copy.deepcopy(world.children), copy.deepcopy(world.pods)
    todo = again.planned()
    assert {key(manifest).name for manifest in todo.apply} <= {"docs-1", *(n.name for n in again.children)}
    assert not [manifest for manifest in todo.apply if "uid" in manifest["metadata"]], "none is changed"
    reasons = {one.reason for one in todo.status.conditions}
    assert "NameConflict" not in reasons
