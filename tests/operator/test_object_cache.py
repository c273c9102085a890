"""What is kept of the API server's objects: the newest of each, however it came, and none that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.listwatch import Event, Page
from moe_api.supervision import Supervisor
from moe_operator.controller.gather import gather
from moe_operator.controller.watches import start_watchers
from moe_operator.errors import (
    ClusterUnavailableError,
    HistoryExpiredError,
    KindUnknownError,
    ReadForbiddenError,
)
from moe_operator.kube.cache import ObjectCache, Place
from moe_operator.kube.watcher import KindWatcher
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


def names(objects, deployment="docs"):
    return [found["metadata"]["name"] for found in objects.of_deployment("Pod", "default", deployment)]


@pytest.fixture
def objects():
    return ObjectCache(frozenset({"Pod"}))


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.sampled_from(["x", "y"])), max_size=30)
)
def test_the_newest_version_of_each_stays_whatever_the_order(steps):
    objects, newest = ObjectCache(frozenset({"Pod"})), {}
    for name, version, deployment in steps:
        new = objects.put("Pod", pod(name, version, deployment))
        assert new == (version > newest.get(name, (0, ""))[0])
        newest[name] = max(newest.get(name, (0, "")), (version, deployment), key=lambda known: known[0])
    for deployment in ("x", "y"):
        assert names(objects, deployment) == sorted(
            n for n, known in newest.items() if known[1] == deployment
        )


def test_an_object_comes_back_as_it_was_but_for_who_set_what(objects):
    objects.put("Pod", pod("a", 1, status={"phase": "Running"}))
    expected = pod("a", 1, status={"phase": "Running"})
    del expected["metadata"]["managedFields"]
    assert objects.get("Pod", "default", "a") == expected


def test_a_cached_pod_names_the_directory_that_its_node_lacks(objects):
    """A message of the runtime names the path, and the pod's volumes say whether it is the model's."""
    volumes = [{"name": "model", "hostPath": {"path": "/mnt/m"}}, {"name": "tmp", "emptyDir": {}}]
    waiting = {"reason": "CreateContainerError", "message": "stat /mnt/m: no such file or directory"}
    status = {"containerStatuses": [{"name": "worker", "ready": False, "state": {"waiting": waiting}}]}
    objects.put("Pod", pod("a", 1, spec={"nodeName": "n", "volumes": volumes}, status=status))
    found = pods.read(objects.get("Pod", "default", "a")).problem
    assert found is not None
    assert found.message.startswith("node n has no directory /mnt/m; correct spec.model.uri")


def test_a_cached_frontend_names_the_secrets_that_it_waits_for(objects):
    settings = {"tls": {"secretName": "front-tls"}, "auth": {"apiKeysSecret": "keys"}}
    spec = frontend.pod_spec(worlds.deployment(frontend=settings)) | {"nodeName": "n"}
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    objects.put("Pod", pod("a", 1, spec=spec, status={"phase": "Pending", "conditions": [scheduled]}))
    found = pods.read(objects.get("Pod", "default", "a")).obstacle(datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC))
    assert found is not None
    assert "check that these Secrets exist: front-tls, keys;" in found.message


def test_a_cached_frontend_is_asked_at_the_port_that_it_declares(objects):
    guarded = {"frontend": {"tls": {"secretName": "front-tls"}}, "transport": {"mode": "Plaintext"}}
    spec = frontend.pod_spec(worlds.deployment(**guarded))
    body = pod("docs-frontend-1", 1, spec=spec, status={"podIP": "10.0.0.1"})
    body["metadata"]["labels"] |= resource_names.frontend_labels("docs")
    objects.put("Pod", body)
    assert pods.read(objects.get("Pod", "default", "docs-frontend-1")).admin_address == "10.0.0.1:8001"


@pytest.mark.parametrize("role", ["worker", "frontend"])
def test_a_cached_pod_with_mutual_tls_is_asked_over_tls(objects, role):
    of = worlds.deployment(transport={"mode": "MutualTLS"})
    spec, labels = {
        "worker": (
            worker.pod_spec(of),
            {**resource_names.single_labels("docs"), resource_names.LABEL_DATA_RANK: "0"},
        ),
        "frontend": (frontend.pod_spec(of), resource_names.frontend_labels("docs")),
    }[role]
    body = pod(
        "docs-0-0" if role == "worker" else "docs-frontend-1", 1, spec=spec, status={"podIP": "10.0.0.1"}
    )
    body["metadata"]["labels"] |= labels
    objects.put("Pod", body)
    found, fresh = pods.read(objects.get("Pod", "default", body["metadata"]["name"])), pods.read(body)
    assert found.secure
    assert (found.grpc_address, found.admin_address) == (fresh.grpc_address, fresh.admin_address)


def test_why_the_last_worker_of_a_name_failed_is_known_after_its_replacement(objects):
    """The StatefulSet controller replaces it at once: a reconcile sees the new pod alone."""
    of = {**resource_names.single_labels("docs"), resource_names.LABEL_DATA_RANK: "0"}
    rejected = {"phase": "Failed", "reason": "OutOfcpu", "startTime": "2026-01-01T00:00:00Z"}
    for version, (uid, status) in enumerate([("first", rejected), ("second", {"phase": "Pending"})], 1):
        body = pod("docs-0-0", version, uid=uid, spec={"nodeName": "n"}, status=status)
        body["metadata"]["labels"] |= of
        objects.put("Pod", body)
    objects.replace("Pod", {Place("default", "docs-0-0"): 2}, 2)

    class Api:
        failed_pod = staticmethod(objects.failed_pod)

        def unreadable(self, kind, namespace):
            return False

        def list(self, kind, namespace, deployment):
            return objects.of_deployment(kind, namespace, deployment)

    (found,) = gather(Api(), worlds.deployment()).pods
    began = datetime(2026, 1, 1, tzinfo=UTC)
    at_first, later = (found.obstacle(began + timedelta(seconds=after)) for after in (59, 60))
    assert (at_first.reason, later) == ("PodFailed", None)
    assert at_first.message.startswith("node n evicted or rejected the pod (OutOfcpu);")


def test_a_worker_that_ended_as_it_should_explains_nothing(objects):
    body = pod("docs-0-0", 1, status={"phase": "Failed"})
    body["metadata"]["labels"] |= resource_names.single_labels("docs")
    objects.put("Pod", body)
    assert objects.failed_pod("default", "docs-0-0") is None


def test_of_a_pods_spec_only_what_is_read_is_kept(objects):
    gates = [{"conditionType": "serving.moe-operator.dev/routed"}]
    objects.put("Pod", pod("a", 1, spec={"nodeName": "n", "readinessGates": gates, "containers": [{}]}))
    assert objects.get("Pod", "default", "a")["spec"] == {"nodeName": "n", "readinessGates": gates}


def test_a_late_deletion_takes_nothing_from_a_successor_of_the_same_name(objects):
    objects.put("Pod", pod("a", 1, uid="first"))
    objects.put("Pod", pod("a", 5, uid="second"))
    objects.drop("Pod", "default", "a", "first")
    assert names(objects) == ["a"]
    objects.drop("Pod", "default", "a", "second")
    assert names(objects) == []


def test_a_list_takes_out_what_it_lacks_unless_it_is_younger_than_the_list(objects):
    objects.put("Pod", pod("gone", 3))
    objects.put("Pod", pod("there", 4))
    objects.put("Pod", pod("made-since", 12))
    assert not objects.complete("Pod")
    assert objects.replace("Pod", {Place("default", "there"): 4}, 10) == {Place("default", "docs")}
    assert names(objects) == ["made-since", "there"]
    assert objects.complete("Pod")


def test_what_an_object_was_found_to_be_holds_until_it_changes(objects):
    objects.put("Pod", pod("a", 1))
    old = objects.get("Pod", "default", "a")
    assert objects.verdict(old) == ""
    objects.note([old], "sound")
    assert objects.verdict(old) == "sound"
    objects.put("Pod", pod("a", 2))
    new = objects.get("Pod", "default", "a")
    assert objects.verdict(new) == ""
    objects.note([old], "sound")  # of a version that is here no more
    assert objects.verdict(new) == ""


async def test_an_operator_that_stops_during_its_first_lists_leaves_no_thread_that_waits(objects):
    """Python waits for such threads at exit: the process would not end."""
    before, script = set(threading.enumerate()), Script()
    cluster = SimpleNamespace(collection=lambda *_: script)
    starting = asyncio.create_task(start_watchers(cluster, objects, None, Supervisor()))
    async with asyncio.timeout(60):
        while not script.done.is_set():
            await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert [one for one in set(threading.enumerate()) - before if not one.daemon] == []


def test_kinds_that_nobody_watches_are_not_kept(objects):
    assert not objects.put("Secret", pod("a", 1))
    assert objects.get("Secret", "default", "a") is None


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


def follow(objects, *answers, kind="Pod"):
    """Follows a script to its end; returns the deployments that were told of."""
    script, told = Script(*answers), []
    settled = threading.Event()
    watcher = KindWatcher(
        script,
        objects,
        kind,
        lambda namespace, deployment: told.append(deployment),
        lambda: told.append("*"),
        settled.set,
    )
    watcher.start(Supervisor(chance=lambda: 0.99, expected=(ReadForbiddenError,)))
    assert script.done.wait(60)
    assert settled.is_set()
    return told


def test_a_list_comes_in_chunks_and_a_watch_goes_on_from_there(objects):
    told = follow(
        objects,
        ([pod("a", 1)], 10, "more"),
        ([pod("b", 2)], 10, None),
        [
            {"type": "ADDED", "object": pod("c", 11)},
            {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "12"}}},
            {"type": "DELETED", "object": pod("a", 13)},
        ],
    )
    assert names(objects) == ["b", "c"]
    assert told == ["docs"] * 4


def test_both_are_told_of_an_object_that_somebody_gives_to_another_deployment(objects):
    moved = {"type": "MODIFIED", "object": pod("a", 11, "other")}
    told = follow(objects, ([pod("a", 1)], 10, None), [moved])
    assert told[0] == "docs"
    assert sorted(told[1:]) == ["docs", "other"]


def test_what_our_own_write_brought_already_is_no_news(objects):
    objects.put("Pod", pod("a", 11))
    assert follow(objects, ([], 10, None), [{"type": "ADDED", "object": pod("a", 11)}]) == []
    assert names(objects) == ["a"]


def test_a_deletion_that_no_watch_told_of_is_found_by_the_next_list(objects):
    told = follow(
        objects,
        ([pod("a", 1), pod("b", 2, "other")], 10, None),
        [HistoryExpiredError("too old resource version")],
        ([pod("b", 2, "other")], 20, None),
    )
    assert names(objects) == []
    assert told == ["docs", "other", "docs"]


def test_a_watch_that_breaks_off_goes_on_where_it_was(objects):
    broken = [{"type": "ADDED", "object": pod("a", 11)}, ClusterUnavailableError("the connection is gone")]
    follow(objects, ([], 10, None), broken, [{"type": "ADDED", "object": pod("b", 12)}])
    assert names(objects) == ["a", "b"]


@pytest.mark.parametrize("malformed", [ValueError("unexpected end of data"), KeyError("metadata")])
def test_after_one_malformed_line_everything_is_listed_again(objects, malformed):
    told = follow(
        objects,
        ([pod("a", 1)], 10, None),
        [{"type": "ADDED", "object": pod("b", 11)}, malformed],
        ([pod("a", 1), pod("b", 11), pod("c", 12)], 12, None),
        [{"type": "ADDED", "object": pod("d", 13)}],
    )
    assert names(objects) == ["a", "b", "c", "d"]
    assert told == ["docs"] * 4


def test_a_kind_that_may_not_be_listed_keeps_nobody_waiting_and_is_told_when_it_may(objects):
    forbidden = ReadForbiddenError("pods is forbidden")
    told = follow(objects, forbidden, ([pod("a", 1)], 10, None), [])
    assert told == ["docs", "*"]
    assert objects.complete("Pod")


def test_what_may_not_be_watched_any_more_is_not_believed(objects):
    told = follow(objects, ([], 10, None), [ReadForbiddenError("no")], ReadForbiddenError("no"))
    assert told == []
    assert not objects.complete("Pod")


def test_of_a_kind_that_the_cluster_may_lack_there_is_nothing_until_its_crd_is_installed(caplog, monkeypatch):
    monkeypatch.setattr("moe_operator.kube.watcher.UNKNOWN_S", 0.01)
    objects, kind = ObjectCache(frozenset({"InferencePool"})), "InferencePool"
    absent = KindUnknownError("inferencepools is unknown to the API server")
    told = follow(
        objects, absent, absent, ([{**pod("a", 1), "kind": kind}], 10, None), [absent], absent, kind=kind
    )
    assert told == ["docs", "docs"]
    assert objects.complete(kind)
    assert objects.of_deployment(kind, "default", "docs") == []
    assert not caplog.records


def test_without_the_right_to_an_optional_kind_the_operator_works_and_says_so_once(caplog, monkeypatch):
    """As after an upgrade of the image with the ClusterRole of an earlier version."""
    monkeypatch.setattr("moe_operator.kube.watcher.UNKNOWN_S", 0.01)
    objects, kind = ObjectCache(frozenset({"InferencePool"})), "InferencePool"
    forbidden = ReadForbiddenError("reading /apis/inferencepools is forbidden; grant the right")
    follow(objects, *[forbidden] * 3, kind=kind)
    (line,) = caplog.messages
    assert line == f"{forbidden}; only deployments with objects of this kind (InferencePool) need it"
    assert objects.doubted(kind, "default")
    told = follow(objects, forbidden, ([{**pod("a", 1), "kind": kind}], 10, None), [], kind=kind)
    assert told == ["docs", "*"]
    assert objects.complete(kind)
    assert not objects.doubted(kind, "default")


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


def test_any_other_kind_that_is_unknown_is_an_error(objects, caplog):
    follow(objects, KindUnknownError("pods is unknown to the API server"), ([], 10, None), [])
    assert "is unknown to the API server" in caplog.text
