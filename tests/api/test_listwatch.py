"""The list-then-watch protocol, scripted; tests/frontend/test_discovery.py has a real API server."""

import contextlib
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.listwatch import (
    Collection,
    Event,
    ExpiredError,
    ListWatch,
    Page,
    Snapshot,
    UnavailableError,
    lines,
)


def thing(name, version, **more):
    return {"metadata": {"namespace": "n", "name": name, "resourceVersion": str(version)}, **more}


class Server:
    """A transport whose answers to lists and watches are scripted; keeps the queries."""

    def __init__(self, *answers):
        self.answers, self.queries = list(answers), []

    def _next(self, path, query):
        self.queries.append({"path": path, **query})
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get(self, path, query):
        return json.dumps(self._next(path, query)).encode()

    @contextlib.contextmanager
    def stream(self, path, query, silence_s):
        events = self._next(path, query)
        yield [b"".join(json.dumps(event).encode() + b"\n" for event in events)]


def listed(*items, version="1", following=None):
    metadata = {"resourceVersion": version, **({"continue": following} if following else {})}
    return {"apiVersion": "v1", "kind": "ThingList", "metadata": metadata, "items": list(items)}


def run(source, sink=None, runs=1):
    """Runs a list-watch until its answers are used up; returns what each run raised."""
    stopping, seen = threading.Event(), []
    watch = ListWatch(source, sink or Snapshot(lambda objects: None), stopping)
    for _ in range(runs):
        with pytest.raises((Exception,)) as caught:
            watch.run()
        seen.append(type(caught.value))
    return seen


def test_a_list_comes_in_pages_with_what_its_items_are():
    server = Server(listed(thing("a", 1), version="7", following="x"), listed(thing("b", 2), version="7"))
    pages = list(Collection(server, "/api/v1/things", "l=v", page_size=1).pages())
    assert [page.version for page in pages] == ["7", "7"]
    assert [item["metadata"]["name"] for page in pages for item in page.items] == ["a", "b"]
    assert all((item["kind"], item["apiVersion"]) == ("Thing", "v1") for page in pages for item in page.items)
    assert server.queries == [
        {"path": "/api/v1/things", "labelSelector": "l=v", "limit": 1},
        {"path": "/api/v1/things", "labelSelector": "l=v", "limit": 1, "continue": "x"},
    ]


def test_a_watch_starts_at_the_version_of_the_list_and_continues_after_an_interruption():
    server = Server(
        listed(version="7"),
        [{"type": "ADDED", "object": thing("a", 8)}, {"type": "BOOKMARK", "object": thing("", 9)}],
        UnavailableError("no connection"),
        [{"type": "MODIFIED", "object": thing("a", 12, new=True)}],
        KeyError("a bug"),
    )
    states = []
    assert run(Collection(server, "/p"), Snapshot(states.append), runs=2) == [UnavailableError, KeyError]
    assert [query.get("resourceVersion") for query in server.queries] == [None, "7", "9", "9", "12"]
    assert states == [{}, {"n/a": thing("a", 8)}, {"n/a": thing("a", 12, new=True)}]


@pytest.mark.parametrize(
    "broken",
    [
        [{"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}}],
        [{"type": "ADDED", "object": {}}],
        ExpiredError("410 Gone"),
        ValueError("a line was cut off"),
    ],
)
def test_everything_is_listed_again_after_an_expired_history_or_an_unexpected_error(broken):
    server = Server(
        listed(thing("a", 1), thing("b", 2), version="7"), broken, listed(thing("b", 2), version="20"), []
    )
    states = []
    run(Collection(server, "/p"), Snapshot(states.append), runs=2)
    assert "resourceVersion" not in server.queries[2]
    assert states[-1].keys() == {"n/b"}


def test_an_error_of_the_server_within_a_watch_interrupts_it():
    server = Server(listed(version="7"), [{"type": "ERROR", "object": {"code": 500, "message": "etcd"}}])
    assert run(Collection(server, "/p")) == [UnavailableError]


def test_a_stopped_watch_takes_nothing_more():
    stopping, taken = threading.Event(), []

    class Source:
        def pages(self):
            yield Page([], "1")

        def events(self, version):
            yield Event("ADDED", thing("a", 2))
            stopping.set()
            yield Event("ADDED", thing("b", 3))

    class Sink:
        def replace(self, pages):
            list(pages)

        def take(self, event):
            taken.append(event.item["metadata"]["name"])

    ListWatch(Source(), Sink(), stopping).run()
    assert taken == ["a"]


@given(st.lists(st.binary(max_size=5)))
def test_lines_do_not_depend_on_how_the_stream_is_cut(pieces):
    assert list(lines(pieces)) == b"".join(pieces).split(b"\n")[:-1]


@given(
    st.lists(
        st.tuples(st.sampled_from(["ADDED", "MODIFIED", "DELETED"]), st.sampled_from("xyz"), st.integers())
    )
)
def test_a_snapshot_is_what_the_server_has(events):
    """Against a plain replay: the last event about a name decides."""
    states, server = [{}], {}
    snapshot = Snapshot(states.append)
    for kind, name, version in events:
        snapshot.take(Event(kind, thing(name, version)))
        server[name] = None if kind == "DELETED" else thing(name, version)
    assert states[-1] == {f"n/{name}": item for name, item in server.items() if item is not None}
