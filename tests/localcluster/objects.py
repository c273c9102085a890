"""Kubernetes objects for tests, and ways to look at what became of them."""

import json
import time
from collections.abc import Callable
from typing import Any

from localcluster import Cluster
from tests.operator.live import COLLECTIONS, read

Object = dict[str, Any]


def pod(
    name: str, *command: str, image: str = "busybox", container: Object | None = None, **spec: Any
) -> Object:
    """A pod with one container "main", which keeps the node's shell from waiting long for its end."""
    main = {"name": "main", "image": image, "command": list(command), **(container or {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"terminationGracePeriodSeconds": 1, "restartPolicy": "Never", "containers": [main], **spec},
    }


def service(name: str, app: str, port: int, target: int, *, headless: bool = False) -> Object:
    spec: Object = {"selector": {"app": app}, "ports": [{"port": port, "targetPort": target}]}
    if headless:
        spec["clusterIP"] = "None"
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def apply(cluster: Cluster, namespace: str, *objects: Object) -> None:
    content = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(content))


def get(cluster: Cluster, namespace: str, kind: str, name: str = "") -> Any:
    if kind in COLLECTIONS:
        collection = COLLECTIONS[kind].format(namespace)
        return read(cluster, f"{collection}/{name}" if name else collection)
    arguments = ["get", "-n", namespace, kind, *([name] if name else []), "-o", "json"]
    return json.loads(cluster.kubectl(*arguments))


def container_status(cluster: Cluster, namespace: str, name: str) -> Any:
    statuses = get(cluster, namespace, "pod", name)["status"].get("containerStatuses", [{}])
    return statuses[0]


def until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """Polls until `condition` gives something true, and gives that."""
    deadline = time.monotonic() + timeout
    while True:
        if result := condition():
            return result
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        time.sleep(0.05)


def output_of(cluster: Cluster, namespace: str, spec: Object) -> str:
    """Runs a pod to its end and gives what it printed; fails unless it succeeded."""
    name = spec["metadata"]["name"]
    apply(cluster, namespace, spec)

    def phase() -> str:
        found: str = get(cluster, namespace, "pod", name)["status"].get("phase", "")
        return found if found in ("Succeeded", "Failed") else ""

    ended = until(phase, 60, f"the end of pod {name}")
    printed = cluster.kubectl("logs", "-n", namespace, name)
    assert ended == "Succeeded", printed
    return printed


def wait_ready(cluster: Cluster, namespace: str, *names: str) -> None:
    pods = [f"pod/{name}" for name in names]
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "--timeout=90s", *pods)
