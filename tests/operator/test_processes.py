"""More than one operator process, and none."""

from __future__ import annotations

import json

import pytest

from tests.operator.live import Live, eventually, manifest


class Processes:
    """The operator's pods."""

    def __init__(self, live: Live) -> None:
        self._live = Live(live.cluster, "moe-system")

    def scale(self, count: int) -> None:
        self._live.kubectl("scale", "deployment/moe-operator", f"--replicas={count}")
        eventually(self.peers, lambda peers: len(peers) == count, f"{count} operator processes")

    def peers(self) -> dict[str, int]:
        """Processes that say they are alive, each with its rank."""
        body = json.loads(
            self._live.cluster.kubectl("get", "clusterkopfpeering", "moe-operator", "-o", "json")
        )
        return {pod: peer["priority"] for pod, peer in (body.get("status") or {}).items()}

    def acting(self) -> str:
        peers = self.peers()
        return max(peers, key=lambda pod: peers[pod])

    def logs(self, pod: str) -> str:
        return self._live.kubectl("logs", pod)

    def kill(self, pod: str) -> None:
        """Ends a process without any goodbye."""
        self._live.kubectl("delete", "pod", pod, "--force", "--grace-period=0")


@pytest.fixture
def processes(live):
    found = Processes(live)
    yield found
    found.scale(1)


def test_of_two_operators_one_acts_and_the_other_takes_over(live, processes):
    processes.scale(2)
    first = processes.acting()
    (other,) = set(processes.peers()) - {first}
    eventually(lambda: processes.logs(other), lambda log: "Pausing operations in favour of" in log, "pause")
    live.apply(manifest("one", replicas=1))
    live.settled("one")
    live.patch("statefulset", "one-0", {"spec": {"replicas": 0}})
    eventually(lambda: live.events("PutBack", "one"), len, "put back")
    live.settled("one")
    assert len(live.events("Created", "one")) == 1
    assert len(live.events("PutBack", "one")) == 1
    assert ": PutBack: " in processes.logs(first)
    assert ": PutBack: " not in processes.logs(other)


def test_a_killed_operator_comes_back_and_restarts_no_worker(live, processes):
    before = {name: pod["metadata"]["uid"] for name, pod in live.leaders("one").items()}
    killed = processes.acting()
    processes.kill(killed)
    live.kubectl("scale", "moed/one", "--replicas=2")
    eventually(lambda: live.get("moed", "one")["status"].get("readyReplicas"), lambda n: n == 2, "scaled", 60)
    after = {name: pod["metadata"]["uid"] for name, pod in live.leaders("one").items()}
    assert after["one-0-0"] == before["one-0-0"]
    assert processes.acting() != killed
