"""The order in which a plan is carried out, and what a refusal keeps from being done: nothing else."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    ClusterUnavailableError,
    OutOfTimeError,
    WebhookUnavailableError,
)
from moe_operator.executor.execute import execute
from moe_operator.planner.changes import Change, Why
from moe_operator.planner.decision import Decision
from moe_operator.planner.gates import Gate
from moe_operator.planner.plan import Deletion, Plan
from moe_operator.render.objects import Key
from moe_operator.resources.deployment import Identity
from moe_operator.resources.status import Status

REMOVED = Decision("ReplicaRemoved", "deleted StatefulSet docs-0: 0 wanted")
OWNER = Identity("default", "docs", "uid-docs", 1)


class Cluster:
    """Writes down what is done; refuses what it is told to."""

    def __init__(self, refusals=()):
        self.done = []
        self.refusals = dict(refusals)

    def _do(self, what):
        self.done.append(what)
        if what in self.refusals:
            raise self.refusals[what]

    def apply(self, manifest):
        self._do(f"apply {manifest['metadata']['name']}")

    def set_pod_condition(self, namespace, name, uid, condition):
        self._do(f"gate {name}")

    def read(self, kind, namespace, name):
        return None

    def delete(self, kind, namespace, name, uid):
        self._do(f"delete {name}")


def plan(*applied, kind="Role"):
    changes = (Change({"kind": kind, "metadata": {"name": name}}, Why.CREATED) for name in applied)
    return Plan(
        made=tuple(changes),
        delete=(Deletion(Key("StatefulSet", "docs-0"), "uid", REMOVED),),
        status=Status(),
        news=(),
        recheck=False,
        gates=(Gate("docs-1-0", "uid", open=True),),
    )


def in_time():
    return True


def test_gates_come_first_then_deletions_then_what_is_applied():
    cluster = Cluster()
    assert execute(cluster, OWNER, plan("a", "b"), in_time) == []
    assert cluster.done == ["gate docs-1-0", "delete docs-0", "apply a", "apply b"]


@pytest.mark.parametrize("refused", ["gate docs-1-0", "delete docs-0", "apply a"])
@pytest.mark.parametrize("error", [ApplyForbiddenError("quota"), ApplyRefusedError("invalid")])
def test_what_is_refused_keeps_nothing_else_from_being_done(refused, error):
    cluster = Cluster({refused: error})
    assert execute(cluster, OWNER, plan("a", "b"), in_time) == [error]
    assert cluster.done == ["gate docs-1-0", "delete docs-0", "apply a", "apply b"]


def test_every_refusal_is_collected_but_a_hundred_replicas_are_not_refused_one_by_one():
    names = [f"docs-{rank}" for rank in range(1, 101)]
    cluster = Cluster({f"apply {name}": ApplyForbiddenError(name) for name in names})
    refusals = execute(cluster, OWNER, plan(*names, kind="StatefulSet"), in_time)
    assert [str(error) for error in refusals] == names[:3]
    assert len(cluster.done) == 2 + 3


def test_a_webhook_that_does_not_respond_is_asked_once_for_each_kind():
    away = WebhookUnavailableError("failed calling webhook")
    cluster, steps = Cluster({f"apply {name}": away for name in "ab"}), itertools.count()
    assert execute(cluster, OWNER, plan("a", "b"), in_time) == [away]
    assert cluster.done[2:] == ["apply a"]
    cluster = Cluster({"delete docs-0": away})
    assert execute(cluster, OWNER, plan("a"), lambda: next(steps) < 2) == [away], "out of time, with a reason"


def test_a_refusal_is_about_the_object_as_it_should_be():
    cluster, todo = Cluster({"apply a": ApplyRefusedError("first")}), plan("a")
    todo.apply[0]["spec"] = {"ours": 1}
    entry = {"manager": "kubectl-edit", "operation": "Update", "fieldsV1": {"f:spec": {"f:theirs": {}}}}
    cluster.read = lambda *_: {"metadata": {"managedFields": [entry]}}

    def merge(manifest):
        cluster.done.append(manifest["spec"])
        raise ApplyRefusedError("second")

    cluster.merge = merge
    assert [str(error) for error in execute(cluster, OWNER, todo, in_time)] == ["first"]
    assert cluster.done[-2:] == ["apply a", {"theirs": None, "ours": 1}]


def test_a_conflict_that_follows_from_a_refusal_does_not_hide_it():
    refused, conflict = ApplyForbiddenError("exceeded quota"), ChangedMeanwhileError("role not found")
    cluster = Cluster({"apply role": refused, "apply binding": conflict})
    assert execute(cluster, OWNER, plan("role", "binding", "service"), in_time) == [refused]
    assert cluster.done[-1] == "apply service"


def test_a_conflict_alone_is_raised_after_the_rest():
    cluster = Cluster({"apply role": ChangedMeanwhileError("somebody else was faster")})
    with pytest.raises(ChangedMeanwhileError):
        execute(cluster, OWNER, plan("role", "service"), in_time)
    assert cluster.done[-1] == "apply service"


def test_an_api_server_that_is_away_ends_it_at_once():
    cluster = Cluster({"delete docs-0": ClusterUnavailableError("away")})
    with pytest.raises(ClusterUnavailableError):
        execute(cluster, OWNER, plan("a"), in_time)
    assert cluster.done == ["gate docs-1-0", "delete docs-0"]


def test_a_plan_out_of_time_continues_in_the_next_reconcile():
    steps = itertools.count()
    cluster = Cluster()
    with pytest.raises(OutOfTimeError, match="3 of 4 changes are applied"):
        execute(cluster, OWNER, plan("a", "b"), lambda: next(steps) < 3)
    assert cluster.done == ["gate docs-1-0", "delete docs-0", "apply a"]


@pytest.mark.parametrize(
    ("failed", "error", "said"),
    [
        ("delete docs-0", ApplyForbiddenError("denied"), ["created Role a, Role b"]),
        ("apply a", ApplyRefusedError("invalid"), ["created Role b", REMOVED.message]),
        ("apply b", ClusterUnavailableError("away"), ["created Role a", REMOVED.message]),
        ("delete docs-0", ClusterUnavailableError("away"), []),
    ],
)
def test_only_what_was_done_is_told_also_where_the_rest_failed(failed, error, said):
    done, todo = set(), plan("a", "b")
    with contextlib.suppress(ClusterUnavailableError):
        execute(Cluster({failed: error}), OWNER, todo, in_time, done.add)
    assert [decision.message for decision in todo.deeds(done)] == said
