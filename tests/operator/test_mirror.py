"""What is kept of the API server's objects: the newest of each, however it came, and none that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.listwatch import Event, Page
from moe_api.supervision import Supervisor
from moe_operator.controller.gather import gather
from moe_operator.controller.watches import follow as follow_all
from moe_operator.errors import (
    ClusterUnavailableError,
    HistoryExpiredError,
    KindUnknownError,
    ReadForbiddenError,
)
from moe_operator.kube.follow import Follower
from moe_operator.kube.mirror import Mirror, Place
from moe_operator.observed import pods
from moe_operator.render import frontend, worker
from moe_operator.resources import names as resource_names
from tests.operator import worlds


def pod(name, version, deployment="docs", uid=None, **more):
    metadata = {
        "namespace": "default",
        "name": name,
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "labels": {"serving.moe-operator.dev/name": deployment},
        "managedFields": [{"manager": "somebody"}],
    }
    return {"kind": "Pod", "metadata": metadata, **more}


def names(mirror, deployment="docs"):
    return [found["metadata"]["name"] for found in mirror.of_deployment("Pod", "default", deployment)]


@pytest.fixture
def mirror():
    return Mirror(frozenset({"Pod"}))


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.sampled_from(["x", "y"])), max_size=30)
)
def test_the_newest_version_of_each_stays_whatever_the_order(steps):
    mirror, newest = Mirror(frozenset({"Pod"})), {}
    for name, version, deployment in steps:
        new = mirror.put("Pod", pod(name, version, deployment))
        assert new == (version > newest.get(name, (0, ""))[0])
        newest[name] = max(newest.get(name, (0, "")), (version, deployment), key=lambda known: known[0])
    for deployment in ("x", "y"):
        assert names(mirror, deployment) == sorted(n for n, known in newest.items() if known[1] == deployment)


def test_an_object_comes_back_as_it_was_but_for_who_set_what(mirror):
    mirror.put("Pod", pod("a", 1, status={"phase": "Running"}))
    expected = pod("a", 1, status={"phase": "Running"})
    del expected["metadata"]["managedFields"]
    assert mirror.get("Pod", "default", "a") == expected


def test_a_cached_pod_names_the_directory_that_its_node_lacks(mirror):
    """A message of the runtime names the path, and the pod's volumes say whether it is the model's."""
    volumes = [{"name": "model", "hostPath": {"path": "/mnt/m"}}, {"name": "tmp", "emptyDir": {}}]
    waiting = {"reason": "CreateContainerError", "message": "stat /mnt/m: no such file or directory"}
    status = {"containerStatuses": [{"name": "worker", "ready": False, "state": {"waiting": waiting}}]}
    mirror.put("Pod", pod("a", 1, spec={"nodeName": "n", "volumes": volumes}, status=status))
    found = pods.read(mirror.get("Pod", "default", "a")).problem
    assert found is not None
    assert found.message.startswith("node n has no directory /mnt/m; correct spec.model.uri")


def test_a_cached_frontend_names_the_secrets_that_it_waits_for(mirror):
    settings = {"tls": {"secretName": "front-tls"}, "auth": {"apiKeysSecret": "keys"}}
    spec = frontend.pod_spec(worlds.deployment(frontend=settings)) | {"nodeName": "n"}
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    mirror.put("Pod", pod("a", 1, spec=spec, status={"phase": "Pending", "conditions": [scheduled]}))
    found = pods.read(mirror.get("Pod", "default", "a")).obstacle(datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC))
    assert found is not None
    assert "check that these Secrets exist: front-tls, keys;" in found.message


def test_a_cached_frontend_is_asked_at_the_port_that_it_declares(mirror):
    guarded = {"frontend": {"tls": {"secretName": "front-tls"}}, "transport": {"mode": "Plaintext"}}
    spec = frontend.pod_spec(worlds.deployment(**guarded))
    body = pod("docs-frontend-1", 1, spec=spec, status={"podIP": "10.0.0.1"})
    body["metadata"]["labels"] |= frontend.labels("docs")
    mirror.put("Pod", body)
    assert pods.read(mirror.get("Pod", "default", "docs-frontend-1")).admin_address == "10.0.0.1:8001"


@pytest.mark.parametrize("role", ["worker", "frontend"])
def test_a_cached_pod_with_mutual_tls_is_asked_over_tls(mirror, role):
    of = worlds.deployment(transport={"mode": "MutualTLS"})
    spec, labels = {
        "worker": (
            worker.pod_spec(of),
            {**resource_names.single_labels("docs"), resource_names.LABEL_DATA_RANK: "0"},
        ),
        "frontend": (frontend.pod_spec(of), frontend.labels("docs")),
    }[role]
    body = pod(
        "docs-0-0" if role == "worker" else "docs-frontend-1", 1, spec=spec, status={"podIP": "10.0.0.1"}
    )
    body["metadata"]["labels"] |= labels
    mirror.put("Pod", body)
    found, fresh = pods.read(mirror.get("Pod", "default", body["metadata"]["name"])), pods.read(body)
    assert found.secure
    assert (found.grpc_address, found.admin_address) == (fresh.grpc_address, fresh.admin_address)


def test_of_a_pods_spec_only_what_is_read_is_kept(mirror):
    gates = [{"conditionType": "serving.moe-operator.dev/routed"}]
    mirror.put("Pod", pod("a", 1, spec={"nodeName": "n", "readinessGates": gates, "containers": [{}]}))
    assert mirror.get("Pod", "default", "a")["spec"] == {"nodeName": "n", "readinessGates": gates}


def test_a_late_deletion_takes_nothing_from_a_successor_of_the_same_name(mirror):
    mirror.put("Pod", pod("a", 1, uid="first"))
    mirror.put("Pod", pod("a", 5, uid="second"))
    mirror.drop("Pod", "default", "a", "first")
    assert names(mirror) == ["a"]
    mirror.drop("Pod", "default", "a", "second")
    assert names(mirror) == []


def test_a_list_takes_out_what_it_lacks_unless_it_is_younger_than_the_list(mirror):
    mirror.put("Pod", pod("gone", 3))
    mirror.put("Pod", pod("there", 4))
    mirror.put("Pod", pod("made-since", 12))
    assert not mirror.complete("Pod")
    assert mirror.replace("Pod", {Place("default", "there"): 4}, 10) == {Place("default", "docs")}
    assert names(mirror) == ["made-since", "there"]
    assert mirror.complete("Pod")


def test_what_an_object_was_found_to_be_holds_until_it_changes(mirror):
    mirror.put("Pod", pod("a", 1))
    old = mirror.get("Pod", "default", "a")
    assert mirror.verdict(old) == ""
    mirror.note([old], "sound")
    assert mirror.verdict(old) == "sound"
    mirror.put("Pod", pod("a", 2))
    new = mirror.get("Pod", "default", "a")
    assert mirror.verdict(new) == ""
    mirror.note([old], "sound")  # of a version that is here no more
    assert mirror.verdict(new) == ""


async def test_an_operator_that_stops_during_its_first_lists_leaves_no_thread_that_waits(mirror):
    """Python waits for such threads at exit: the process would not end."""
    before, script = set(threading.enumerate()), Script()
    cluster = SimpleNamespace(collection=lambda *_: script)
    starting = asyncio.create_task(follow_all(cluster, mirror, None, Supervisor()))
    async with asyncio.timeout(60):
        while not script.done.is_set():
            await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert [one for one in set(threading.enumerate()) - before if not one.daemon] == []


def test_kinds_that_nobody_follows_are_not_kept(mirror):
    assert not mirror.put("Secret", pod("a", 1))
    assert mirror.get("Secret", "default", "a") is None


class Script:
    """Plays the API server: each list and each watch is the next in a row; at the end, silence."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self.done = threading.Event()

    def _next(self):
        if not self._answers:
            self.done.set()
            threading.Event().wait(3600)
        return self._answers.pop(0)

    def pages(self):
        more = True
        while more:
            answer = self._next()
            if isinstance(answer, Exception):
                raise answer
            items, version, more = answer
            yield Page(items, str(version))

    def events(self, version):
        for event in self._next():
            if isinstance(event, Exception):
                raise event
            yield Event(event["type"], event["object"])


def follow(mirror, *answers, kind="Pod"):
    """Follows a script to its end; returns the deployments that were told of."""
    script, told = Script(*answers), []
    settled = threading.Event()
    follower = Follower(
        script,
        mirror,
        kind,
        lambda namespace, deployment: told.append(deployment),
        lambda: told.append("*"),
        settled.set,
    )
    follower.start(Supervisor(chance=lambda: 0.99, expected=(ReadForbiddenError,)))
    assert script.done.wait(60)
    assert settled.is_set()
    return told


def test_a_list_comes_in_chunks_and_a_watch_goes_on_from_there(mirror):
    told = follow(
        mirror,
        ([pod("a", 1)], 10, "more"),
        ([pod("b", 2)], 10, None),
        [
            {"type": "ADDED", "object": pod("c", 11)},
            {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "12"}}},
            {"type": "DELETED", "object": pod("a", 13)},
        ],
    )
    assert names(mirror) == ["b", "c"]
    assert told == ["docs"] * 4


def test_both_are_told_of_an_object_that_somebody_gives_to_another_deployment(mirror):
    moved = {"type": "MODIFIED", "object": pod("a", 11, "other")}
    told = follow(mirror, ([pod("a", 1)], 10, None), [moved])
    assert told[0] == "docs"
    assert sorted(told[1:]) == ["docs", "other"]


def test_what_our_own_write_brought_already_is_no_news(mirror):
    mirror.put("Pod", pod("a", 11))
    assert follow(mirror, ([], 10, None), [{"type": "ADDED", "object": pod("a", 11)}]) == []
    assert names(mirror) == ["a"]


def test_a_deletion_that_no_watch_told_of_is_found_by_the_next_list(mirror):
    told = follow(
        mirror,
        ([pod("a", 1), pod("b", 2, "other")], 10, None),
        [HistoryExpiredError("too old resource version")],
        ([pod("b", 2, "other")], 20, None),
    )
    assert names(mirror) == []
    assert told == ["docs", "other", "docs"]


def test_a_watch_that_breaks_off_goes_on_where_it_was(mirror):
    broken = [{"type": "ADDED", "object": pod("a", 11)}, ClusterUnavailableError("the connection is gone")]
    follow(mirror, ([], 10, None), broken, [{"type": "ADDED", "object": pod("b", 12)}])
    assert names(mirror) == ["a", "b"]


@pytest.mark.parametrize("malformed", [ValueError("unexpected end of data"), KeyError("metadata")])
def test_after_one_malformed_line_everything_is_listed_again(mirror, malformed):
    told = follow(
        mirror,
        ([pod("a", 1)], 10, None),
        [{"type": "ADDED", "object": pod("b", 11)}, malformed],
        ([pod("a", 1), pod("b", 11), pod("c", 12)], 12, None),
        [{"type": "ADDED", "object": pod("d", 13)}],
    )
    assert names(mirror) == ["a", "b", "c", "d"]
    assert told == ["docs"] * 4


def test_a_kind_that_may_not_be_listed_keeps_nobody_waiting_and_is_told_when_it_may(mirror):
    forbidden = ReadForbiddenError("pods is forbidden")
    told = follow(mirror, forbidden, ([pod("a", 1)], 10, None), [])
    assert told == ["docs", "*"]
    assert mirror.complete("Pod")


def test_what_may_not_be_watched_any_more_is_not_believed(mirror):
    told = follow(mirror, ([], 10, None), [ReadForbiddenError("no")], ReadForbiddenError("no"))
    assert told == []
    assert not mirror.complete("Pod")


def test_of_a_kind_that_the_cluster_may_lack_there_is_nothing_until_its_crd_is_installed(caplog, monkeypatch):
    monkeypatch.setattr("moe_operator.kube.follow.UNKNOWN_S", 0.01)
    mirror, kind = Mirror(frozenset({"InferencePool"})), "InferencePool"
    absent = KindUnknownError("inferencepools is unknown to the API server")
    told = follow(
        mirror, absent, absent, ([{**pod("a", 1), "kind": kind}], 10, None), [absent], absent, kind=kind
    )
    assert told == ["docs", "docs"]
    assert mirror.complete(kind)
    assert mirror.of_deployment(kind, "default", "docs") == []
    assert not caplog.records


def test_without_the_right_to_an_optional_kind_the_operator_works_and_says_so_once(caplog, monkeypatch):
    """As after an upgrade of the image with the ClusterRole of an earlier version."""
    monkeypatch.setattr("moe_operator.kube.follow.UNKNOWN_S", 0.01)
    mirror, kind = Mirror(frozenset({"InferencePool"})), "InferencePool"
    forbidden = ReadForbiddenError("reading /apis/inferencepools is forbidden; grant the right")
    follow(mirror, *[forbidden] * 3, kind=kind)
    (line,) = caplog.messages
    assert line == f"{forbidden}; only deployments with objects of this kind (InferencePool) need it"
    assert mirror.doubted(kind, "default")
    told = follow(mirror, forbidden, ([{**pod("a", 1), "kind": kind}], 10, None), [], kind=kind)
    assert told == ["docs", "*"]
    assert mirror.complete(kind)
    assert not mirror.doubted(kind, "default")


@pytest.mark.parametrize("uses", [False, True])
def test_what_may_not_be_read_is_asked_for_only_where_it_is_used(uses):
    asked = []

    class Api:
        def __getattr__(self, name):
            return lambda *_: ""

        def unreadable(self, kind, namespace):
            return kind == "InferencePool"

        def list(self, kind, *_):
            asked.append(kind)
            if kind == "InferencePool":
                raise ReadForbiddenError("no")
            return []

    of = worlds.deployment(
        **({"frontend": {"inferencePool": {"endpointPicker": {"name": "epp"}}}} if uses else {})
    )
    with pytest.raises(ReadForbiddenError) if uses else contextlib.nullcontext():
        gather(Api(), of)
    assert ("InferencePool" in asked) == uses


def test_any_other_kind_that_is_unknown_is_an_error(mirror, caplog):
    follow(mirror, KindUnknownError("pods is unknown to the API server"), ([], 10, None), [])
    assert "is unknown to the API server" in caplog.text
