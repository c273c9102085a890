"""Reports, cold starts and what is kept."""

from __future__ import annotations

import base64
import json
import math
import random
from datetime import timedelta
from types import SimpleNamespace

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from moe_api.worker.v1 import worker_pb2
from moe_operator.autoscaling import coldstart, readings, scaling_history
from moe_operator.autoscaling.model.capacity import Capacity
from moe_operator.autoscaling.model.history import History, HistoryError
from moe_operator.autoscaling.model.horizon import ColdStarts
from moe_operator.autoscaling.rounds import ScaledFactory
from moe_operator.autoscaling.scaler import Memory
from moe_operator.observed import pods
from moe_operator.resources.deployment import Identity
from tests.operator.autoscaling.simulated import START, pod

OWNER = Identity("default", "docs", "uid-docs", 1)
UINT_MINUS_ONE = 2**64 - 1


def load(**fields):
    return worker_pb2.Load(**{"requests_received": 10, "requests_completed": 8, **fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"requests_refused": 3}, "11 requests ended although 10 arrived"),
        ({"requests_received": 0, "requests_completed": UINT_MINUS_ONE}, "requests ended although 0 arrived"),
        ({"queued": 2**32 - 1, "running": 2}, "4294967297 requests are active although 10 arrived"),
        ({"requests_received": 2**63}, "contains a sum above"),
        ({"started": Timestamp(seconds=2**62)}, "contains an invalid start time"),
        ({"started": Timestamp(nanos=-1)}, "contains an invalid start time"),
        (
            {"time_to_first_token_seconds": worker_pb2.Histogram(bounds=range(65), counts=[0] * 66)},
            "more than 64 buckets",
        ),
        (
            {"time_to_first_token_seconds": worker_pb2.Histogram(bounds=[2.0, 1.0], counts=[0] * 3)},
            "bounds do not ascend",
        ),
        (
            {"time_to_first_token_seconds": worker_pb2.Histogram(bounds=[math.nan], counts=[0] * 2)},
            "bounds do not ascend",
        ),
        ({"kv_tokens_used": 2, "kv_tokens_capacity": 1}, "more of the KV cache is used than exists"),
        (
            {"time_to_first_token_seconds": worker_pb2.Histogram(bounds=[1.0], counts=[1])},
            "counts do not fit its bounds",
        ),
        (
            {"time_to_first_token_seconds": worker_pb2.Histogram(bounds=[1.0], counts=[9, 9])},
            "histogram of more requests than arrived",
        ),
    ],
)
def test_a_report_that_contradicts_itself_is_named(fields, sentence):
    assert readings.contradiction(load()) is None
    assert sentence in readings.contradiction(load(**fields))


@pytest.mark.parametrize(("target", "late"), [(0.1, 9), (0.25, 5), (0.3, 2), (0.5, 2), (0.6, 0), (9.0, 0)])
def test_late_is_what_is_surely_above_the_target(target, late):
    counts = [7, 4, 3, 2]  # up to 0.1, 0.25, 0.5, above
    assert readings.late([0.1, 0.25, 0.5], counts, target) == late


def measured(manifest):
    return coldstart.measure(pods.read(manifest))


def test_the_phases_of_a_cold_start_come_from_the_pod():
    found = measured(pod("docs", 0, "u", START, 40, ready=True))
    assert (found.scheduling, found.image, found.loading, found.total) == (1, 1, 38, 40)


def test_a_container_that_was_started_again_tells_nothing_of_cold_starts():
    restarted = pod("docs", 0, "u", START, 40, ready=True)
    restarted["status"]["containerStatuses"][0]["restartCount"] = 1
    assert measured(restarted) is None
    assert measured(pod("docs", 0, "u", START, 40, ready=False)) is None
    assert measured({"metadata": {"name": "x", "uid": "u"}, "status": {}}) is None
    odd = pod("docs", 0, "u", START + timedelta(seconds=9), -20, ready=True)
    assert measured(odd) is None


def test_a_pod_that_became_ready_again_long_after_its_start_tells_nothing_of_cold_starts():
    """Kubernetes stores only the last change of a condition: a pod whose probe failed once looks new."""
    assert measured(pod("docs", 0, "u", START, 3600, ready=True)).total == 3600
    assert measured(pod("docs", 0, "u", START, 3 * 24 * 3600, ready=True)) is None


def memory(minutes=14 * 24 * 60):
    history = History()
    for minute in range(minutes):
        history.add(minute, 600 + (minute * 7919) % 601)
    return Memory(history, ColdStarts((40.0, 50.0)), frozenset({"a", "b"}), Capacity(90.0, 60.0, 4))


def test_what_is_kept_comes_back():
    kept = scaling_history.manifest(OWNER, memory(), pods=["a", "c"])
    found = scaling_history.memory(kept, OWNER)
    assert list(found.history.items()) == list(memory().history.items())
    assert found.cold_starts.seconds == (40.0, 50.0)
    assert found.capacity == Capacity(90.0, 60.0, 4)
    assert found.measured == {"a"}, "pods that are gone are forgotten"


def both(whole, recent):
    """The state in two objects."""
    return scaling_history.with_recent(scaling_history.memory(whole, OWNER), recent, OWNER)


def hours(count, whole_until=0):
    """What is written in `count` hours, one object every five minutes, with the memory at the end."""
    chance, days, written = random.Random(1), 14 * 24 * 60, []
    kept = memory(0)
    for minute in range(days):
        kept.history.add(minute, chance.gauss(1000, 32))
    for minute in range(days, days + 60 * count):
        kept.history.add(minute, chance.gauss(1000, 32))
        if minute % 5 == 4:
            due = scaling_history.due(OWNER, kept, {"a"}, whole_until)
            whole_until = due.whole_until
            written.append(due.manifest)
    return written, kept


def test_most_writes_hold_only_the_minutes_since_the_last_whole_history():
    written, kept = hours(13)
    by_name = {manifest["metadata"]["name"]: manifest for manifest in written}
    names = [manifest["metadata"]["name"] for manifest in written]
    assert [index for index, name in enumerate(names) if name == "docs"] == [0, 72, 144]
    assert set(names) == {"docs", "docs.recent"}
    found = both(by_name["docs"], by_name["docs.recent"])
    assert list(found.history.items()) == list(kept.history.items())
    assert found.whole_until == scaling_history.memory(by_name["docs"], OWNER).history.end
    assert found.capacity == kept.capacity
    every_time = len(written) * len(json.dumps(by_name["docs"]))
    assert sum(len(json.dumps(manifest)) for manifest in written) < every_time / 15


def test_a_recent_history_that_is_older_than_the_whole_one_changes_nothing():
    written, _ = hours(7)
    stale, whole = written[71], written[72]
    assert (stale["metadata"]["name"], whole["metadata"]["name"]) == ("docs.recent", "docs")
    alone, with_stale = scaling_history.memory(whole, OWNER), both(whole, stale)
    assert list(with_stale.history.items()) == list(alone.history.items())


def stored(whole, recent, minute=10**9):
    """What an operator that starts in this minute reads of these objects."""
    objects = {"docs": whole, "docs.recent": recent}
    cluster = SimpleNamespace(get=lambda kind, namespace, name: objects[name])
    return ScaledFactory._stored(SimpleNamespace(cluster=cluster), OWNER, minute)


def test_without_the_whole_history_a_recent_one_says_nothing():
    written, _ = hours(1)
    assert stored(None, written[-1]) is None


def test_an_invalid_recent_history_costs_its_minutes_alone(caplog):
    written, _ = hours(1)
    whole = next(one for one in written if one["metadata"]["name"] == "docs")
    found = stored(whole, {**written[-1], "rates": "AAAA"})
    assert list(found.history.items()) == list(scaling_history.memory(whole, OWNER).history.items())
    assert found.whole_until == found.history.end
    assert "ScalingHistory docs.recent is invalid: rates: unpack_from" in caplog.text
    assert caplog.text.rstrip().endswith("scaling starts without the latest minutes")
    with pytest.raises(HistoryError, match="ScalingHistory docs is invalid"):
        stored({**whole, "rates": "AAAA"}, written[-1])


def test_rates_that_a_clock_which_was_ahead_has_dated_stand_in_the_way_of_no_later_ones():
    """An operator whose clock was two days ahead for a while; then it starts again with the right one."""
    kept, now = memory(1000), 1000
    kept.history.add(now + 2 * 24 * 60, 7.0)
    whole = scaling_history.manifest(OWNER, kept, ())
    found = stored(whole, None, now)
    assert found.whole_until == 0, "the whole history is written again"
    assert list(found.history.items())[:-1] == list(memory(1000).history.items())
    found.history.add(now + 1, 5.0)
    assert dict(found.history.items())[now + 1] == pytest.approx(5.0, rel=0.001)
    assert found.cold_starts == kept.cold_starts
    same = stored(whole, None, now + 2 * 24 * 60)
    assert (same.whole_until, len(same.history)) == (kept.history.end, len(kept.history))
    early = stored(whole, None, 0)
    early.history.add(1, 5.0)
    assert [rate for minute, rate in early.history.items() if minute == 1] == [pytest.approx(5.0, rel=0.001)]


def test_minutes_while_no_operator_ran_are_unknown():
    written, _ = hours(1)
    later = memory(10)
    later.history.add(14 * 24 * 60 + 90, 7.0)
    due = scaling_history.due(OWNER, later, (), 14 * 24 * 60 + 5)
    found = both(written[0], due.manifest)
    rates = dict(found.history.items())
    assert rates[14 * 24 * 60 + 30] is None
    assert rates[14 * 24 * 60 + 90] == pytest.approx(7.0, rel=0.001)


def test_fourteen_days_take_less_than_a_hundred_kib():
    assert len(str(scaling_history.manifest(OWNER, memory(), pods=[]))) < 100 * 1024


def test_the_history_belongs_to_the_deployment_and_to_no_later_one_of_its_name():
    kept = scaling_history.manifest(OWNER, memory(10), pods=[])
    assert kept["metadata"]["ownerReferences"][0]["uid"] == "uid-docs"
    assert scaling_history.memory(kept, Identity("default", "docs", "another", 1)) is None
    assert scaling_history.memory(None, OWNER) is None


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"rates": "AAAA"}, "rates: unpack_from requires"),
        (
            {"rates": base64.b64encode(b"\x02" + bytes(20)).decode()},
            "rates: its version is 2; this",
        ),
        ({"capacity": None}, "capacity: Input should be"),
        (
            {"capacity": {"perReplica": 0.0, "prior": 60.0}},
            "capacity.perReplica: .* greater than 0$",
        ),
        ({"capacity": {"perReplica": "NaN", "prior": 0}}, r"capacity.perReplica: .* \(and 1 more\)$"),
        ({"coldStartSeconds": ["x"]}, "coldStartSeconds.0: "),
        ({"coldStartSeconds": [-1.0]}, "coldStartSeconds.0: Input should be greater than or equal to 0"),
    ],
)
def test_an_invalid_history_is_named_with_its_first_invalid_field(damage, sentence):
    kept = {**scaling_history.manifest(OWNER, memory(10), pods=[]), **damage}
    with pytest.raises(HistoryError, match=f"^ScalingHistory {OWNER.name} is invalid: {sentence}"):
        scaling_history.memory(kept, OWNER)
