"""Revisions on record: undo restores every field that makes one, and other fields make none."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_cli.rollout import restoring
from moe_operator.observed.observation import Observed, observe
from moe_operator.planner import revisions
from moe_operator.render import frontend, worker
from moe_operator.render.objects import Key
from moe_operator.resources import names
from moe_operator.resources.deployment import parse
from moe_operator.resources.spec import Spec
from tests.operator import manifests_at_random
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.worlds import deployment, settled

QUALITY = {"maxLoss": "5m"}


def parsed(spec):
    """A deployment with this spec, or None where the spec is not valid; CEL rules are not tried here."""
    try:
        Spec.model_validate(spec)
        worker.pod_spec(found := deployment(**spec))
        return found
    except (ValidationError, TypeError, ValueError):
        return None


def patched(spec, operations):
    """The spec after a JSON patch of its top-level fields (RFC 6902)."""
    after = copy.deepcopy(spec)
    for operation in operations:
        field = operation["path"].removeprefix("/spec/")
        if operation["op"] == "remove":
            del after[field]
        else:
            after[field] = operation["value"]
    return after


@settings(max_examples=300, deadline=None)
@given(manifests_at_random.mutated(), manifests_at_random.mutated(), st.booleans())
def test_an_edit_makes_a_revision_that_undo_restores_or_none(spec, edited, gated):
    before, after = parsed(spec | ({"quality": QUALITY} if gated else {})), parsed(edited)
    if before is None or after is None:
        return
    recorded = revisions.current(before, Observed())["data"]
    edit = after.spec.manifest()
    undone = deployment(**patched(edit, restoring(recorded, {"metadata": {}, "spec": edit})))
    assert worker.pod_spec(undone) == worker.pod_spec(before), "undo restores the pods exactly"
    unrevised = {field: value for field, value in edit.items() if field not in names.REVISED_FIELDS}
    assert unrevised.items() <= undone.spec.manifest().items(), "undo changes nothing else"
    assert worker.revision(undone) == worker.revision(before)


@settings(deadline=None)
@given(manifests_at_random.mutated())
def test_fields_that_undo_leaves_alone_make_no_revision(edited):
    after = parsed(edited)
    if after is None:
        return
    before = deployment()
    revised = {
        field: value for field, value in before.spec.manifest().items() if field in names.REVISED_FIELDS
    }
    unrevised = {f: v for f, v in after.spec.manifest().items() if f not in names.REVISED_FIELDS}
    assert worker.revision(deployment(**revised, **unrevised)) == worker.revision(before)


def restarted(spec, time_text):
    """The deployment after `moe rollout restart`."""
    annotations = {names.ANNOTATION_RESTARTED: time_text} if time_text else {}
    metadata = {"name": "docs", "namespace": "default", "uid": "u", "annotations": annotations}
    return parse({"metadata": metadata, "spec": spec})


def test_a_restart_is_a_revision_of_its_own_which_undo_takes_back():
    spec = deployment().spec.manifest()
    never, once, twice = (
        restarted(spec, text) for text in (None, "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")
    )
    assert len({worker.revision(one) for one in (never, once, twice)}) == 3
    assert worker.revision(never) == worker.revision(deployment()), "as before there were restarts"
    assert frontend.rendered(once) != frontend.rendered(never)
    path = "/metadata/annotations/kubectl.kubernetes.io~1restartedAt"
    body = {"metadata": {"annotations": {names.ANNOTATION_RESTARTED: "2026-01-02T00:00:00Z"}}, "spec": spec}
    to_once, to_never = (revisions.current(one, Observed())["data"] for one in (once, never))
    assert [o for o in restoring(to_once, body) if o["path"] == path] == [
        {"op": "add", "path": path, "value": "2026-01-01T00:00:00Z"}
    ]
    assert [o for o in restoring(to_never, body) if o["path"] == path] == [{"op": "remove", "path": path}]
    assert len(restarted(spec, "x" * 300_000).restarted_at) == 64, "it goes into every pod: bounded"


def test_a_restart_replaces_every_pod_in_the_order_of_a_rollout():
    world = settled(replicas=2)
    before = world.revisions()
    world.deployment = replace(world.deployment, restarted_at="2026-01-01T00:00:00Z")
    for _ in range(8):
        world.step()
        assert world.serving() >= 2
        world.all_ready()
    after = world.revisions()
    assert len(after) == 2
    assert not set(before.values()) & set(after.values())
    assert world.status.restarted_at == "2026-01-01T00:00:00Z"
    template = world.children[Key("Deployment", "docs-frontend")]["spec"]["template"]
    assert template["metadata"]["annotations"] == {names.ANNOTATION_RESTARTED: "2026-01-01T00:00:00Z"}
    world.change(replicas=3)
    world.step()
    assert len(set(world.revisions().values())) == 1, "scaling afterwards restarts nothing"


def test_a_field_that_was_not_set_is_removed():
    recorded = {"spec": {"quality": None, "engine": {"a": 1}}}
    body = {"metadata": {}, "spec": {"quality": QUALITY, "engine": {"a": 1}}}
    assert list(restoring(recorded, body)) == [{"op": "remove", "path": "/spec/quality"}]
    del body["spec"]["quality"]
    assert list(restoring(recorded, body)) == []


def test_a_field_that_the_recording_operator_did_not_have_is_removed():
    """Else undo of the edit that turns mutual TLS off would change nothing."""
    recorded = revisions.current(deployment(), Observed())["data"]
    del recorded["spec"]["transport"]
    spec = deployment(transport={"mode": "Plaintext"}).spec.manifest()
    undone = deployment(**patched(spec, restoring(recorded, {"metadata": {}, "spec": spec})))
    assert worker.revision(undone) == worker.revision(deployment())


@pytest.fixture(scope="module")
def api(api_server):
    return Api(api_server)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_records_survive_on_a_real_api_server(api):
    """It keeps the nulls, and lets nobody change a record when another spec makes the same revision."""
    spec = {"model": {"uri": "file:///mnt/models/docs-moe"}, "engine": {"kvMemory": "512Mi"}}
    body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "undo"}, "spec": spec}
    assert api.ask("POST", COLLECTION, body)[0] == 201
    try:
        writes, again = api.reconcile("undo")
        assert (writes > 0, again) == (True, False)
        (record,) = api.cluster.list("ControllerRevision", "default", "undo")
        assert record["data"]["spec"]["quality"] is None
        assert api.reconcile("undo") == (0, False), "the record is as it should be"
        same = {"spec": {"engine": {"kvMemory": "536870912"}}}
        assert api.ask("PATCH", f"{COLLECTION}/undo", same)[0] == 200
        for _ in range(3):
            assert not api.reconcile("undo")[1]
        conditions = api.cluster.get(names.KIND, "default", "undo")["status"]["conditions"]
        assert "ApplyRefused" not in {condition["reason"] for condition in conditions}
    finally:
        api.clear("undo")


def test_a_record_that_an_undo_restores_keeps_the_numbers_that_it_had():
    first, second = deployment(), deployment(engine={"contextLength": 512})
    known = {}

    def record(of):
        made = revisions.current(of, observe(known.values()))
        known[Key(revisions.KIND, made["metadata"]["name"])] = made
        return made["revision"], made["metadata"]["annotations"].get(names.ANNOTATION_FORMER)

    assert [record(one) for one in (first, first, second)] == [(1, None), (1, None), (2, None)]
    assert [record(one) for one in (first, first)] == [(3, "1"), (3, "1")], "it comes to rest"
    assert record(second) == (4, "2")
    assert record(first) == (5, "1,3")
