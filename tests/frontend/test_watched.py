"""Frontends that know what replicas hold: pure decisions, and watches over real gRPC on loopback."""

import asyncio
import random
import time

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_api.inference.v1 import inference_pb2
from moe_api.prefixes import CHANGE_MOST, names_of
from moe_api.supervision import Backoff
from moe_api.tenancy import SALT_KEY
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_frontend.policy import watched
from moe_frontend.policy.balancing import Asked, ExactPrefixAffinity, Question, question_of
from moe_frontend.policy.routing import Load, choose
from moe_frontend.policy.watched import SENT_S, Held, ImplausibleChangeError, WatchedIndex
from moe_frontend.transport import watching
from moe_frontend.transport.watching import CacheWatching
from tests.frontend.fake_worker import FakeWorker, says_bytes
from tests.frontend.fleet import Fleet

NAMES = st.lists(st.integers(0, 20), max_size=8)


def change(sequence, stored=(), evicted=(), reset=None):
    first = sequence == 1 if reset is None else reset
    return worker_pb2.CacheChange(sequence=sequence, reset=first, stored=stored, evicted=evicted)


def told(index, replica, *blocks):
    held = Held()
    index.apply(replica, held, change(1, blocks))
    return held


def test_a_prompt_goes_where_its_beginning_is_whoever_sent_it():
    policy = ExactPrefixAffinity()
    for replica, blocks in (("a", ()), ("b", (1, 2)), ("c", (2, 3))):
        told(policy.index, replica, *blocks)
    loads = [Load("a"), Load("b", 1), Load("c")]
    decision = choose(loads, frozenset(), 0.0, ranking=Asked(policy, Question((1, 2, 3))))
    assert (decision.replica, decision.reason) == ("b", "PrefixAffinityExact")


def test_an_evicted_block_is_not_held_although_it_was_sent():
    index = WatchedIndex()
    held = told(index, "a")
    index.note("a", [1, 2], 0.0)
    assert index.held([1, 2], 1.0) == {"a": 2}
    index.apply("a", held, change(2, [1]))
    assert index.held([1, 2], SENT_S) == {"a": 1}
    index.apply("a", held, change(3, evicted=[1]))
    assert index.held([1, 2], SENT_S) == {"a": 0}


def test_of_a_replica_without_a_watch_what_was_sent_counts():
    index = WatchedIndex()
    index.note("a", [1, 2], 0.0)
    held = told(index, "a", 1)
    assert index.held([1, 2], 100.0) == {"a": 1}
    index.forget("a", Held())
    assert index.held([1, 2], 100.0) == {"a": 1}
    index.forget("a", held)
    assert index.held([1, 2], 100.0) == {"a": 2}
    index.keep(frozenset("b"))
    assert index.held([1, 2], 100.0) == {}


@pytest.mark.parametrize(
    "wrong",
    [change(3, reset=False), change(2), change(2, reset=False), change(1, range(CHANGE_MOST + 1))],
    ids=["gap", "later reset", "no snapshot", "too large"],
)
def test_a_watch_that_does_not_begin_with_a_snapshot_is_refused(wrong):
    with pytest.raises(ImplausibleChangeError):
        Held().apply(wrong, 100)


def test_a_gap_is_noticed():
    held = Held()
    held.apply(change(1, [1, 2]), 100)
    held.apply(change(2, [3], [1]), 100)
    assert held.blocks == {2, 3}
    held.apply(change(3, [7], reset=True), 100)
    assert held.blocks == {7}
    with pytest.raises(ImplausibleChangeError):
        held.apply(change(5), 100)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans(), NAMES, NAMES, st.binary()),
        max_size=40,
    ),
    NAMES,
)
def test_whatever_replicas_say_the_index_is_bounded_and_answers(messages, blocks):
    """Sequence numbers that go on, stay, or jump; junk in the messages."""
    index, watches = WatchedIndex(most=30), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watched, "HELD_MOST", 14)
        for replica, step, reset, stored, evicted, junk in messages:
            held = watches.setdefault(replica, Held())
            message = change(held.sequence + step, stored, evicted, reset or not held.sequence)
            try:
                message.MergeFromString(junk)
                index.apply(replica, held, message)
            except (ImplausibleChangeError, DecodeError):
                index.forget(replica, watches.pop(replica))
            assert index.blocks <= 30
            assert all(len(held.blocks) <= 14 for held in watches.values())
            counts = index.held(blocks, 0.0)
            assert counts.keys() <= watches.keys()
            for name, count in counts.items():
                assert set(blocks[:count]) <= watches[name].blocks


class Caches(worker_pb2_grpc.WorkerServiceServicer):
    """WatchCache of a worker: sends what a test puts into `says`; an error code ends the call."""

    def __init__(self):
        self.says, self.watched, self.running = asyncio.Queue(), 0, 0

    async def WatchCache(self, request, context):
        self.watched += 1
        self.running += 1
        try:
            while True:
                said = await self.says.get()
                if isinstance(said, grpc.StatusCode):
                    await context.abort(said, "as the test says")
                await context.write(said)
        finally:
            self.running -= 1


class WatchedFleet(Fleet):
    """The frontend watches the workers' caches."""

    def __init__(self):
        self.caches = [Caches(), Caches()]
        self.policy = ExactPrefixAffinity()
        super().__init__(self.caches, self.policy)
        self.watching = CacheWatching(
            self.replicas, self.policy.index, self.supervisor, Backoff(first_s=0.01, longest_s=0.01)
        )

    async def until_held(self, blocks, **counts):
        found = {name.replace("_", "-"): count for name, count in counts.items()}
        await self.until(lambda: self.policy.index.held(blocks, 0.0) == found)


@pytest.fixture
async def fleet():
    one = WatchedFleet()
    await one.start()
    yield one
    await one.close()


async def test_a_frontend_follows_what_its_replicas_hold(fleet):
    fleet.caches[0].says.put_nowait(change(1, [1, 2]))
    fleet.caches[1].says.put_nowait(change(1, [1, 2, 3]))
    await fleet.until_held([1, 2, 3], w_0=2, w_1=3)
    fleet.caches[1].says.put_nowait(change(2, evicted=[2]))
    await fleet.until_held([1, 2, 3], w_0=2, w_1=1)
    reader = InMemoryMetricReader()
    fleet.watching.measure(MeterProvider([reader]).get_meter("test"))
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    assert {metric.name: metric.data.data_points[0].value for metric in scope.metrics} == {
        "moe_frontend.watched_caches.replicas": 2,
        "moe_frontend.watched_caches.blocks": 4,
    }


async def test_a_gap_or_the_end_of_a_watch_asks_for_a_new_snapshot(fleet):
    for end in (change(7, [3]), grpc.StatusCode.UNAVAILABLE):
        before = fleet.caches[0].watched
        fleet.caches[0].says.put_nowait(change(1, [1, 2]))
        await fleet.until_held([1, 2, 3], w_0=2)
        fleet.caches[0].says.put_nowait(end)
        await fleet.until_held([1, 2, 3])
        await fleet.until(lambda before=before: fleet.caches[0].watched == before + 1)
    await fleet.until(lambda: fleet.caches[0].running == 1)


async def test_a_replica_that_is_gone_is_watched_no_more_and_one_that_returns_is(fleet):
    fleet.caches[0].says.put_nowait(change(1, [1]))
    await fleet.until_held([1], w_0=1)
    fleet.publish(fleet.workers[1])
    await fleet.until_held([1])
    await fleet.until(lambda: fleet.caches[0].running == 0)
    fleet.publish(*fleet.workers)
    fleet.caches[0].says.put_nowait(change(1, [1]))
    await fleet.until_held([1], w_0=1)


async def test_a_replica_without_the_call_is_not_asked_again(fleet):
    fleet.caches[0].says.put_nowait(grpc.StatusCode.UNIMPLEMENTED)
    await fleet.until(lambda: len(fleet.supervisor.states) == 1)
    fleet.publish(*fleet.workers)
    fleet.caches[1].says.put_nowait(change(1, [1]))
    await fleet.until_held([1], w_1=1)
    assert (fleet.caches[0].watched, fleet.caches[1].watched) == (1, 1)


async def test_bytes_that_are_no_message_end_the_watch_and_nothing_else(fleet):
    """Random bytes, and real messages that were cut or changed, over the wire."""
    chance, good = random.Random(1), change(1, [1, 2]).SerializeToString()
    said = [chance.randbytes(chance.randint(1, 40)) for _ in range(20)]
    said += [good[:-1], good + b"\xff", b"\xff\xff", good.replace(good[:1], b"\xff")]
    watches = 0

    async def junk(request, context):
        nonlocal watches
        watches += 1
        yield said[watches - 1] if watches <= len(said) else good
        await asyncio.Event().wait()

    worker = FakeWorker("w-2")
    await worker.start(leaving=says_bytes("WatchCache", junk))
    fleet.publish(*fleet.workers, worker)
    fleet.caches[0].says.put_nowait(change(1, [1]))
    await fleet.until_held([1, 2], w_0=1, w_2=2)
    assert all(state.failures == 0 for state in fleet.supervisor.states)
    await worker.server.stop(None)


async def test_a_replica_that_floods_leaves_the_frontend_time(fleet, monkeypatch):
    monkeypatch.setattr(watching, "PACE_S", 0.05)
    fleet.caches[0].says.put_nowait(change(1))
    for number in range(2, 1000):
        fleet.caches[0].says.put_nowait(change(number, range(CHANGE_MOST)))
    fleet.caches[1].says.put_nowait(change(1, [1]))
    await fleet.until(lambda: fleet.policy.index.held([1], 0.0).get("w-1") == 1)
    held = fleet.policy.index._watched["w-0"]
    before, began = held.sequence, time.monotonic()
    await asyncio.sleep(0.2)
    assert held.sequence - before <= 1 + (time.monotonic() - began) / watching.PACE_S


@pytest.mark.parametrize("metadata", [[], [("x-cache-salt", "a")], [("authorization", "Bearer b")]])
async def test_a_worker_is_told_the_salt_that_the_frontend_names_blocks_with(bench, metadata):
    b = await bench(workers=1)
    request = inference_pb2.GenerateRequest(prompt="count 1 0" + " " * 2000)
    await b.text(request.prompt, metadata=metadata)
    (worker,) = b.workers
    (asked,), (told,) = worker.asked, worker.metadata
    names = names_of(asked, told.get(SALT_KEY, ""))
    assert names == question_of(request, metadata).blocks
    assert len(names) == 3
