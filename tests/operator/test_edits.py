"""What counts as an edit of a deployment, and goes before other reconciles."""

from moe_operator.controller.edits import Edits
from moe_operator.resources import names


def body(generation=1, uid="u", **metadata):
    return {"metadata": {"uid": uid, "generation": generation, **metadata}, "spec": {}}


def test_creations_edits_restarts_and_deletions_are_edits():
    edits = Edits()
    restarted = body(2, annotations={names.ANNOTATION_RESTARTED: "now"})
    events = [("ADDED", body()), ("MODIFIED", body(2)), ("MODIFIED", restarted), ("DELETED", restarted)]
    assert [edits.take(kind, found) for kind, found in events] == [True] * 4
    assert edits.take("ADDED", body(uid="another of the name"))


def test_status_writes_and_repeated_lists_are_none():
    edits = Edits()
    assert edits.take(None, body())
    assert not edits.take("MODIFIED", body() | {"status": {"replicas": 1}})
    assert not edits.take(None, body())
    assert edits.take(None, body(2)), "edited while there was no watch"
