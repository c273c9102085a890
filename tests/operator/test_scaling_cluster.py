"""Scaling on a real cluster by the installed operator: stand-ins for workers, a clock 60 times as fast.

A recorded day is played through the frontend in about a minute: one second of ours is a minute of the scaling
clock, and 18 minutes of the recording.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from localcluster import Cluster, Forward
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_operator.autoscaling.model.history import History
from moe_operator.resources import names
from moe_tools.load.trace import read
from tests.e2e.serving import kill_processes
from tests.operator.live import STANDIN_PATH, Live, eventually, manifest

DAY = Path(__file__).parent / "data/worldcup98_may21.csv"
MOE = Path(sys.executable).with_name("moe")
SPEED = 60
PLAYED, SHARE = 1080, 0.00037
SERVED_PER_S = 8.0
"""What a stand-in serves: four at a time, half a second each. In the scaling clock that is 8 a minute."""
FAST = {"STANDIN_SLOTS": "4", "STANDIN_SECONDS": "0.5"}


@pytest.fixture(scope="module")
def fast(operator: Cluster, live: Live) -> Iterator[Live]:
    """An operator whose scaling clock runs 60 times faster."""
    deployment = ("-n", "moe-system", "deployment/moe-operator")
    operator.kubectl("set", "env", *deployment, f"MOE_OPERATOR_SCALING_SPEED={SPEED}")
    operator.kubectl("rollout", "status", *deployment, "--timeout=90s")
    yield live
    operator.kubectl("set", "env", *deployment, "MOE_OPERATOR_SCALING_SPEED-")
    operator.kubectl("rollout", "status", *deployment, "--timeout=90s")


def scaled(name: str, scaling: dict[str, Any], *, env: dict[str, str], **spec: Any) -> dict[str, Any]:
    """A deployment that scales; a replica is taken to serve 6 of the 8 requests a second that it can."""
    variables = {"PATH": STANDIN_PATH, **env}
    return manifest(
        name,
        scaling={"priorRequestsPerSecond": 6.0 / SPEED, "maxReplicas": 6, **scaling},
        worker={
            "env": [{"name": key, "value": value} for key, value in variables.items()],
            "terminationGracePeriodSeconds": 5,
        },
        **spec,
    )


@dataclass
class Look:
    at_s: float
    desired: int
    ready: int


@dataclass
class Watcher:
    """Looks at a deployment twice a second, in a thread."""

    live: Live
    name: str
    looks: list[Look] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watcher:
        self.started = time.monotonic()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def run(self) -> None:
        while not self.stop.wait(0.5):
            at = time.monotonic() - self.started
            status = self.live.get("moed", self.name)["status"]
            desired = status.get("scaling", {}).get("desiredReplicas", status["desiredReplicas"])
            self.looks.append(Look(at, desired, status["readyReplicas"]))


def play(live: Live, name: str, share: float, *options: str) -> subprocess.Popen[str]:
    """Starts to play the day against a deployment; its end is to be awaited."""
    forward = Forward(live.cluster.directory, live.namespace, f"{name}-frontend", 8000)
    forward.__enter__()
    command = [str(MOE), "load", str(DAY), "--endpoint", forward.address, "--prompt", "x", "--json"]
    words = ["--speed", str(PLAYED), "--share", str(share), "--timeout", "20", *options]
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True)
    threading.Thread(target=lambda: (process.wait(), forward.__exit__(None, None, None)), daemon=True).start()
    return process


def status(live: Live, name: str) -> dict[str, Any]:
    return live.get("moed", name)["status"]


def kept(live: Live, name: str) -> History:
    """The stored minutes: the whole history, and the minutes since it was written."""
    rates = {one["metadata"]["name"]: one["rates"] for one in live.list("scalinghistories")}
    history = History.load(rates[name])
    if names.recent_history(name) in rates:
        history.extend(History.load(rates[names.recent_history(name)]))
    return history


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_follow_a_recorded_day_through_the_death_of_the_operator(fast):
    fast.apply(scaled("day", {"minReplicas": 1}, env=FAST))
    fast.apply(scaled("advised", {"mode": "Advisory"}, env=FAST, replicas=1))
    for name in ("day", "advised"):
        fast.settled(name)
    with Watcher(fast, "day") as day, Watcher(fast, "advised") as advised:
        loads = [play(fast, "day", SHARE), play(fast, "advised", SHARE / 3)]
        time.sleep(25)  # the night, and the first hours of the morning
        first = eventually(lambda: kept(fast, "day"), lambda history: len(history) > 8, "a history is kept")
        pods = ("get", "pods", "-n", "moe-system", "-o", "jsonpath={.items[0].metadata.name}")
        assert kill_processes(f"HOSTNAME={fast.cluster.kubectl(*pods)}") > 0
        summary, _ = (json.loads(load.communicate(timeout=150)[0]) for load in loads)
        # The evening is over; what follows is a night without anybody.
        eventually(lambda: day.looks[-1].ready, lambda ready: ready <= 2, "replicas fall", 60)

    # Before the load: one more replica is ordered before the existing ones are full.
    offered = np.convolve(read(DAY).counts * SHARE * PLAYED / 300, np.ones(12) / 12, "valid")
    most = max(look.desired for look in day.looks)
    assert most >= 4
    for count in range(1, int(offered.max() // SERVED_PER_S) + 1):
        full = float(np.argmax(offered > count * SERVED_PER_S)) * 300 / PLAYED
        ordered = next(look.at_s for look in day.looks if look.desired > count)
        assert ordered < full, (
            f"replica {count + 1} was ordered after {ordered:.1f} s, needed after {full:.1f} s"
        )
    assert fast.events("ScaledUp", "day")
    assert fast.events("ScaledDown", "day")

    # Requests keep the latency target of 2.5 s, 95 of 100, and none fails.
    assert summary["requests"]["failed"] == {}
    assert summary["time_to_first_token_s"]["p95"] < 2.5

    # The operator that was killed went on with its history, and took no replica away.
    last = kept(fast, "day")
    assert next(iter(last.items()))[0] == next(iter(first.items()))[0]
    assert last.end > first.end + 20

    told = status(fast, "day")["scaling"]
    assert told["forecast"]["lower"] <= told["forecast"]["requestsPerSecond"] <= told["forecast"]["upper"]
    assert told["lastDecision"]["after"] == told["desiredReplicas"]
    assert told["lastColdStart"]["total"] > 0
    # Scaling edits spec.replicas: for a moment there is the condition of the spec before.
    active = eventually(
        lambda: fast.condition("ScalingActive", "day"), bool, "ScalingActive of this spec", 10
    )
    assert active["status"] == "True"

    # The other one was only advised.
    assert {look.ready for look in advised.looks} == {1}
    assert len(fast.leaders("advised")) == 1
    assert max(look.desired for look in advised.looks) > 1
    assert any("would scale from 1 to" in said for said in fast.events("ScalingAdvised", "advised"))
    assert fast.condition("ScalingActive", "advised")["reason"] == "Advisory"
    fast.kubectl("delete", "moed", "day", "advised", "--wait=false")


def test_the_history_goes_with_the_deployment(fast):
    fast.apply(scaled("brief", {"mode": "Advisory"}, env={}, replicas=0))
    eventually(lambda: fast.kubectl("get", "scalinghistories"), lambda found: "brief" in found, "kept")
    assert base64.b64decode(fast.get("scalinghistories", "brief")["rates"])
    fast.kubectl("delete", "moed", "brief")
    eventually(lambda: fast.kubectl("get", "scalinghistories"), lambda found: "brief" not in found, "gone")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_last_replica_goes_and_the_first_request_waits_for_a_new_one(fast):
    fast.apply(scaled("zero", {"minReplicas": 0}, env={}))
    # Deadlines are for a crowded machine; on a free one each of these takes seconds.
    fast.wait("Ready", "AllReplicasReady", "zero", 180)
    fast.wait("Ready", "ScaledToZero", "zero", 180)
    eventually(lambda: fast.leaders("zero"), lambda pods: not pods, "no pod", 180)
    with (
        Forward(fast.cluster.directory, fast.namespace, "zero-frontend", 8000) as forward,
        grpc.insecure_channel(forward.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(prompt="x")
        texts = [part.text for part in stub.Generate(request, timeout=240, wait_for_ready=True)]
    assert texts == ["token"]
    assert any("FirstRequest" in said for said in fast.events("ScaledUp", "zero"))
    fast.kubectl("delete", "moed", "zero", "--wait=false")


SPOILED = {
    "silent": "spoiled-silent-0-0 does not report its load",
    "future": "its clock is wrong",
    "contradictory": "requests ended although",
}


def test_reports_that_are_wrong_or_missing_change_nothing_and_are_named(fast):
    for kind in SPOILED:
        fast.apply(scaled(f"spoiled-{kind}", {"minReplicas": 1}, env={"STANDIN_REPORT": kind}))
    for kind, sentence in SPOILED.items():
        name = f"spoiled-{kind}"
        condition = fast.wait("ScalingActive", "ReportsUnusable", name)
        eventually(
            lambda n=name: fast.condition("ScalingActive", n)["message"],
            lambda said, s=sentence: s in said,
            f"{name} named",
        )
        assert condition["status"] == "False"
        assert status(fast, name)["desiredReplicas"] == 1
        assert fast.events("ScaledUp", name) == fast.events("ScaledDown", name) == []
    fast.kubectl("delete", "moed", *(f"spoiled-{kind}" for kind in SPOILED), "--wait=false")


def test_scaling_that_is_turned_off_leaves_replicas_and_no_stale_status(fast):
    fast.apply(scaled("off", {"minReplicas": 2}, env={}))
    fast.settled("off")
    eventually(lambda: status(fast, "off").get("scaling"), bool, "reported")
    fast.patch("moed", "off", {"spec": {"scaling": {"mode": "Off"}}})
    fast.wait("ScalingActive", "Off", "off")
    eventually(lambda: "scaling" in status(fast, "off"), lambda found: not found, "no status of scaling")
    fast.patch("moed", "off", {"spec": {"scaling": None, "replicas": 1}})
    eventually(lambda: fast.leaders("off"), lambda pods: len(pods) == 1, "one replica")
    eventually(
        lambda: [c["type"] for c in status(fast, "off")["conditions"]],
        lambda kinds: "ScalingActive" not in kinds,
        "no condition of scaling",
    )
    fast.kubectl("delete", "moed", "off", "--wait=false")
