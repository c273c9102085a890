"""Workloads behave on the local cluster as on any other: the real kubelet starts, probes and stops them."""

import os
import re
import secrets
import signal
import subprocess
import time
from pathlib import Path

import pytest

from localcluster import Cluster, images
from localcluster.errors import CommandError
from localcluster.images import Image
from localcluster.layout import CHECKOUT, Layout
from tests.localcluster.objects import (
    apply,
    container_status,
    get,
    output_of,
    pod,
    service,
    until,
    wait_ready,
)

HTTP = ("python", "-m", "http.server", "8000")
PLACES = ("/", "/tmp", "/run")  # noqa: S108 - the container's own /tmp
HTTP_READY = {"readinessProbe": {"httpGet": {"port": 8000}, "periodSeconds": 1}}


def host_pids(marker: str) -> list[int]:
    """Processes of this machine with that text on their command line: the containers are among them."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                command = (directory / "cmdline").read_text(errors="replace").split("\0")
            except OSError:
                continue
            if marker in command:
                found.append(int(directory.name))
    return found


def the_process(marker: str, timeout: float, what: str, besides: int = 0) -> int:
    """Waits for the one container's process; between fork and exec, a child of it looks like another one."""

    def alone() -> set[int]:
        pids = set(host_pids(marker)) - {besides}
        return pids if len(pids) == 1 else set()

    [pid] = until(alone, timeout, what)
    return pid


def stateful_set(name: str, replicas: int) -> dict:
    template = pod(name, *HTTP, image="python:3", container=HTTP_READY)
    template["spec"]["restartPolicy"] = "Always"
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "serviceName": name,
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": template["metadata"], "spec": template["spec"]},
        },
    }


def test_a_stateful_sets_pods_are_ready_addressable_and_listed(cluster: Cluster, namespace: str) -> None:
    apply(
        cluster,
        namespace,
        service("web", "web", 8000, 8000, headless=True),
        service("front", "web", 80, 8000),
        stateful_set("web", 2),
    )
    cluster.kubectl("rollout", "status", "-n", namespace, "statefulset/web", "--timeout=30s")
    addresses = {p["status"]["podIP"] for p in get(cluster, namespace, "pods")["items"]}
    assert len(addresses) == 2

    def listed() -> set[str]:
        slices = get(cluster, namespace, "endpointslices")["items"]
        web = [s for s in slices if s["metadata"]["labels"]["kubernetes.io/service-name"] == "web"]
        return {e["addresses"][0] for s in web for e in s["endpoints"] or [] if e["conditions"]["ready"]}

    until(lambda: listed() == addresses, 60, "both addresses in the EndpointSlice")

    # Names as the specification of cluster DNS has them, short and long; and the service's own address works.
    script = f"""
import socket, urllib.request
def resolve(name): return sorted({{i[4][0] for i in socket.getaddrinfo(name, 80, socket.AF_INET)}})
print(resolve("web"), resolve("web-0.web"), resolve("web-1.web.{namespace}.svc.cluster.local"))
print(resolve("front.{namespace}") == resolve("front.{namespace}.svc"))
print(urllib.request.urlopen("http://front/", timeout=60).status)
try: resolve("web-2.web")
except socket.gaierror as error: print(error.errno == socket.EAI_NONAME)
"""
    printed = output_of(cluster, namespace, pod("client", "python", "-c", script, image="python:3"))
    names, *rest = printed.splitlines()
    both = sorted(addresses)
    assert names.startswith(str(both))
    assert sorted(re.findall(r"\d+\.\d+\.\d+\.\d+", names.removeprefix(str(both)))) == both
    assert rest == ["True", "200", "True"]


def test_a_killed_process_is_restarted_with_backoff_and_shows_its_exit_code(
    cluster: Cluster, namespace: str
) -> None:
    marker = secrets.token_hex(8)
    apply(cluster, namespace, pod("victim", "sh", "-c", "sleep 1000; true", marker, restartPolicy="Always"))
    first = the_process(marker, 60, "the process")
    os.kill(first, signal.SIGKILL)
    second = the_process(marker, 60, "the restarted process", besides=first)
    status = until(
        lambda: (s := container_status(cluster, namespace, "victim")).get("restartCount") == 1 and s,
        60,
        "a restart",
    )
    assert status["lastState"]["terminated"]["exitCode"] == 128 + signal.SIGKILL
    os.kill(second, signal.SIGKILL)

    # The waiting reason CrashLoopBackOff shows at the kubelet's next sync, 10 s later; the event at once.
    def reasons() -> str:
        return cluster.kubectl("get", "events", "-n", namespace, "-o", "jsonpath={.items[*].reason}")

    until(lambda: "BackOff" in reasons(), 60, "the back-off")
    assert host_pids(marker) == []


def test_a_container_shows_its_exit_code_and_last_words(cluster: Cluster, namespace: str) -> None:
    spec = pod(
        "failing",
        "sh",
        "-c",
        "echo starting; echo 'error: no such model' >&2; exit 3",
        container={"terminationMessagePolicy": "FallbackToLogsOnError"},
    )
    apply(cluster, namespace, spec)
    ended = until(
        lambda: container_status(cluster, namespace, "failing").get("state", {}).get("terminated"),
        60,
        "the end",
    )
    assert ended["exitCode"] == 3
    assert ended["message"].splitlines() == ["starting", "error: no such model"]


def test_a_failing_liveness_probe_restarts(cluster: Cluster, namespace: str) -> None:
    probe = {
        "exec": {"command": ["sh", "-c", "test ! -e /tmp/sick"]},
        "periodSeconds": 1,
        "failureThreshold": 1,
    }
    command = "if test -e /data/once; then sleep 1000; fi; touch /data/once /tmp/sick; sleep 1000"
    spec = pod(
        "sickly",
        "sh",
        "-c",
        command,
        container={"livenessProbe": probe, "volumeMounts": [{"name": "data", "mountPath": "/data"}]},
        volumes=[{"name": "data", "emptyDir": {}}],
        restartPolicy="Always",
    )
    apply(cluster, namespace, spec)
    until(
        lambda: (s := container_status(cluster, namespace, "sickly")).get("restartCount") == 1 and s["ready"],
        90,
        "a restart",
    )
    events = cluster.kubectl("get", "events", "-n", namespace, "-o", "jsonpath={.items[*].message}")
    assert "failed liveness probe, will be restarted" in events


@pytest.mark.parametrize(
    ("trap", "grace", "at_least", "at_most"),
    [("echo asked", 2, 2.0, 60.0), ("echo asked; exit 0", 120, 0.0, 60.0)],
    ids=["killed after the grace period", "gone at once when it obeys"],
)
def test_deletion_honours_the_grace_period(
    cluster: Cluster, namespace: str, trap: str, grace: int, at_least: float, at_most: float
) -> None:
    marker = secrets.token_hex(8)
    script = f"trap '{trap}' TERM; echo up; while true; do sleep 0.1; done"
    spec = pod("stubborn", "sh", "-c", script, marker, terminationGracePeriodSeconds=grace)
    apply(cluster, namespace, spec)
    wait_ready(cluster, namespace, "stubborn")
    with subprocess.Popen(
        [
            cluster.directory / "bin/kubectl",
            f"--kubeconfig={cluster.kubeconfig}",
            "logs",
            "-f",
            "-n",
            namespace,
            "stubborn",
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "up\n"
        began = time.monotonic()
        cluster.kubectl("delete", "pod", "-n", namespace, "stubborn", "--wait=true")
        took = time.monotonic() - began
        assert follower.stdout.readline() == "asked\n"
    assert at_least <= took <= at_most
    assert host_pids(marker) == []


def test_volumes_are_readable_at_their_mount_paths(cluster: Cluster, namespace: str) -> None:
    objects = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"key": "from-config"}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "s"},
            "stringData": {"key": "from-secret"},
        },
    ]
    field = {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}
    token = {"serviceAccountToken": {"path": "token", "audience": "someone", "expirationSeconds": 600}}
    volumes = [
        {"name": "c", "configMap": {"name": "c"}},
        {"name": "s", "secret": {"secretName": "s"}},
        {"name": "d", "downwardAPI": {"items": [field]}},
        {"name": "p", "projected": {"sources": [token]}},
        {"name": "e", "emptyDir": {}},
        {"name": "m", "emptyDir": {"medium": "Memory"}},
    ]
    mounts = [{"name": v["name"], "mountPath": f"/srv/not/there/{v['name']}"} for v in volumes]
    mounts.append({"name": "c", "mountPath": "/etc/one-file", "subPath": "key"})
    script = (
        "cd /srv/not/there; cat c/key; echo; cat s/key; echo; cat d/labels; echo; cut -d. -f1 p/token; "
        "echo kept > e/f; cat e/f; echo kept > m/f; cat m/f; cat /etc/one-file; echo; "
        "touch c/key 2>/dev/null || echo read-only"
    )
    main = {
        "volumeMounts": mounts,
        "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
    }
    apply(cluster, namespace, *objects)
    reader = pod("reader", "sh", "-c", f"{script}; echo $NODE", container=main, volumes=volumes)
    config, secret, labels, header, *rest = output_of(cluster, namespace, reader).splitlines()
    assert (config, secret, labels) == ("from-config", "from-secret", 'app="reader"')
    assert header.startswith("eyJ")  # '{"' in base64: the header of a JSON Web Token
    assert rest == ["kept", "kept", "from-config", "read-only", "local"]


def test_a_volume_below_another_volume_is_readable(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the node")
    main = {
        "volumeMounts": [
            {"name": "outer", "mountPath": "/srv/outer"},
            {"name": "inner", "mountPath": "/srv/outer/inner"},
        ]
    }
    volumes = [{"name": "outer", "emptyDir": {}}, {"name": "inner", "hostPath": {"path": str(tmp_path)}}]
    reader = pod("reader", "cat", "/srv/outer/inner/file", container=main, volumes=volumes)
    assert output_of(cluster, namespace, reader) == "from the node\n"


def test_a_volume_of_an_image_shows_its_content_read_only(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/file").write_text("from the image")
    model = Image("example.org/model:1", content=str(tmp_path))
    images.load(Layout(cluster.directory).images, model)
    mounts = [
        {"name": "model", "mountPath": "/srv/model"},
        {"name": "model", "mountPath": "/srv/weights", "subPath": "weights"},
    ]
    volumes = [{"name": "model", "image": {"reference": model.name, "pullPolicy": "IfNotPresent"}}]
    script = "cat /srv/model/weights/file /srv/weights/file; touch /srv/model/x 2>&1 || echo read-only"
    reader = pod("reader", "sh", "-c", script, container={"volumeMounts": mounts}, volumes=volumes)
    printed = output_of(cluster, namespace, reader)
    assert printed.startswith("from the imagefrom the image")
    assert printed.endswith("read-only\n")


def test_a_volume_does_not_hide_the_programs_of_the_image(cluster: Cluster, namespace: str) -> None:
    main = {"volumeMounts": [{"name": "outer", "mountPath": str(CHECKOUT.parent)}]}
    volumes = [{"name": "outer", "emptyDir": {}}]
    script = "import click; print(click.__name__)"
    reader = pod("reader", "python3", "-c", script, image="python:3", container=main, volumes=volumes)
    assert output_of(cluster, namespace, reader) == "click\n"


def test_a_containers_files_are_its_own(cluster: Cluster, namespace: str) -> None:
    name = f"made-by-{namespace}"
    written = " && ".join(f"echo x > {place}/{name}" for place in PLACES)
    script = f'{written} && test -z "$(ls {cluster.directory})"'
    output_of(cluster, namespace, pod("writer", "sh", "-c", f"mkdir -p {cluster.directory}; {script}"))
    assert [p for p in PLACES if os.access(p, os.R_OK) and (Path(p) / name).exists()] == []
    main = {"securityContext": {"readOnlyRootFilesystem": True}}
    script = f"touch /{name} || touch /tmp/{name} || echo refused"
    assert "refused" in output_of(cluster, namespace, pod("reader", "sh", "-c", script, container=main))


def test_kubectl_logs_follows(cluster: Cluster, namespace: str) -> None:
    script = "n=0; while true; do n=$((n+1)); echo line $n; sleep 0.2; done"
    apply(cluster, namespace, pod("talker", "sh", "-c", script))
    wait_ready(cluster, namespace, "talker")
    command = [
        cluster.directory / "bin/kubectl",
        f"--kubeconfig={cluster.kubeconfig}",
        "logs",
        "-f",
        "-n",
        namespace,
    ]
    with subprocess.Popen([*command, "talker"], stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        first = follower.stdout.readline()
        # Whoever does not follow gives no line that was printed after this.
        printed = cluster.kubectl("logs", "-n", namespace, "talker").splitlines()
        lines = [first, *(follower.stdout.readline() for _ in range(len(printed) + 2))]
        follower.terminate()
    assert lines == [f"line {n}\n" for n in range(1, len(printed) + 4)]


def test_a_kubelet_restart_keeps_running_pods(cluster: Cluster, namespace: str) -> None:
    marker = secrets.token_hex(8)
    apply(cluster, namespace, pod("keeper", "sh", "-c", "echo first; sleep 2000; true", marker))
    wait_ready(cluster, namespace, "keeper")
    before, pids = container_status(cluster, namespace, "keeper"), host_pids(marker)
    cluster.restart("kubelet")
    apply(cluster, namespace, pod("later", "sleep", "1000"))
    wait_ready(cluster, namespace, "later")
    after = container_status(cluster, namespace, "keeper")
    assert (after["containerID"], after["restartCount"]) == (before["containerID"], 0)
    assert host_pids(marker) == pids
    assert cluster.kubectl("logs", "-n", namespace, "keeper") == "first\n"


def test_a_dead_runtime_takes_its_containers_along_and_pods_come_back(
    cluster: Cluster, namespace: str
) -> None:
    marker = secrets.token_hex(8)
    apply(cluster, namespace, pod("phoenix", "sh", "-c", "sleep 3000; true", marker, restartPolicy="Always"))
    before = the_process(marker, 60, "the process")
    cluster.restart("runtime")
    after = the_process(marker, 120, "the new process", besides=before)
    assert host_pids(marker) == [after]


def test_any_component_may_die(cluster: Cluster, namespace: str) -> None:
    steady = pod("steady", *HTTP, image="python:3", container=HTTP_READY)
    apply(cluster, namespace, service("steady", "steady", 80, 8000), steady)
    wait_ready(cluster, namespace, "steady")
    for component in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "network-agent"):
        cluster.restart(component)
    script = "import urllib.request as r; print(r.urlopen('http://steady/', timeout=60).status)"
    assert output_of(cluster, namespace, pod("later", "python", "-c", script, image="python:3")) == "200\n"
    assert container_status(cluster, namespace, "steady")["restartCount"] == 0
    assert {c["name"]: c["restarts"] > 0 for c in cluster.status()}["etcd"]


def test_a_pod_in_the_nodes_network_has_its_address(cluster: Cluster, namespace: str) -> None:
    spec = pod("near", "python", "-m", "http.server", "8123", image="python:3", hostNetwork=True)
    apply(cluster, namespace, spec)
    wait_ready(cluster, namespace, "near")
    assert get(cluster, namespace, "pod", "near")["status"]["podIP"] == "10.244.0.1"
    script = (
        "import urllib.request as r, time\n"
        "for _ in range(50):\n"
        "    try: print(r.urlopen('http://10.244.0.1:8123/', timeout=5).status); break\n"
        "    except OSError: time.sleep(0.1)"
    )
    assert output_of(cluster, namespace, pod("client", "python", "-c", script, image="python:3")) == "200\n"


def test_what_cannot_start_says_why(cluster: Cluster, namespace: str) -> None:
    apply(
        cluster,
        namespace,
        pod("nothing", "no-such-program"),
        pod("unknown", "true", image="example.com/unknown:1"),
        pod("imageless-command", image="busybox"),
    )

    def state(name: str) -> str:
        found = container_status(cluster, namespace, name).get("state", {})
        return str(found.get("waiting", {}).get("message", "")) + str(
            found.get("terminated", {}).get("message", "")
        )

    assert 'exec: "no-such-program": executable file not found in $PATH' in until(
        lambda: state("nothing"), 60, "a message"
    )
    unknown = until(lambda: state("unknown"), 60, "a message")
    assert "Known: busybox:latest, " in unknown
    assert "ghcr.io/moe-operator/operator:dev, " in unknown
    assert "has no entrypoint" in until(lambda: state("imageless-command"), 60, "a message")
    assert container_status(cluster, namespace, "unknown")["state"]["waiting"]["reason"] in (
        "ErrImagePull",
        "ImagePullBackOff",
    )
    apply(cluster, namespace, pod("alive", "sleep", "1000"))
    wait_ready(cluster, namespace, "alive")
    with pytest.raises(CommandError, match="no exec: containers here are processes of this machine"):
        cluster.kubectl("exec", "-n", namespace, "alive", "--", "true")
