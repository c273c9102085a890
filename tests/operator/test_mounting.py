"""Pods whose volumes are not mounted, as a real kubelet reports them."""

from __future__ import annotations

from moe_operator.observed import pod_status
from tests.localcluster.objects import apply, get, pod, until

SLEEP = {"name": "first", "image": "busybox", "command": ["sleep", "60"]}


def test_a_pod_that_waits_for_its_volumes_is_known_with_and_without_init_containers(cluster, namespace):
    missing = [{"name": "s", "secret": {"secretName": "missing"}}]
    apply(
        cluster,
        namespace,
        pod("plain", "sleep", "60", volumes=missing),
        pod("fetching", "sleep", "60", volumes=missing, initContainers=[SLEEP]),
        pod("running", "sleep", "60", initContainers=[SLEEP]),
    )

    def seen(name):
        return pod_status.read(get(cluster, namespace, "pod", name))

    for name in ("plain", "fetching"):
        status = until(lambda name=name: (found := seen(name)).containers and found, 60, name)
        assert status.mounting_since is not None
        assert status.secrets == ("missing",)
    status = until(lambda: (found := seen("running")).holds("PodReadyToStartContainers") and found, 60, "it")
    assert status.mounting_since is None
