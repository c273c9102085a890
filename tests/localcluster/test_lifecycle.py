"""Starting and stopping: what `up` leaves running, what `down` leaves behind (nothing), whatever happens in
between.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from localcluster import Cluster, Forward
from localcluster.errors import AlreadyRunningError, ForwardError, LocalClusterError, NotRunningError
from localcluster.layout import CHECKOUT, Layout
from localcluster.processes import Identity, Record, identify
from tests.localcluster.objects import apply, pod, service, until, wait_ready

CLI = (sys.executable, "-m", "localcluster")


def processes_of(directory: Path) -> list[int]:
    """Processes of this machine that belong to a cluster: they see its state directory mounted."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                mounts = (entry / "mountinfo").read_text()
                command = (entry / "cmdline").read_text(errors="replace")
            except OSError:
                continue
            if f"{directory} /run/localcluster " in mounts or f"\0{directory}\0" in command:
                found.append(int(entry.name))
    return found


def assert_nothing_left(directory: Path) -> None:
    assert processes_of(directory) == []
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert {p.name for p in directory.iterdir()} <= {"logs", "lock"}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A state directory with a path too long for the address of a unix socket."""
    path = tmp_path / ("long-" * 20)
    path.mkdir()
    yield path
    Cluster(path).down()
    assert_nothing_left(path)


def start_up(directory: Path) -> "subprocess.Popen[str]":
    command = [*CLI, "--dir", str(directory), "up"]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if word in line:
            return
    raise AssertionError(f"`up` ended without saying {word}: {process.communicate()[1]}")


def test_two_clusters_run_side_by_side_and_the_command_line_works(cluster: Cluster, directory: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = subprocess.run(
            [*CLI, "--dir", str(directory), *arguments],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr

    assert "no cluster runs in" in run("status", code=1)
    assert "The cluster is up after" in run("up")
    assert "runs already" in run("up", code=1)
    assert "kube-apiserver" in run("status")
    other = Cluster(directory)
    other.kubectl("create", "namespace", "only-here")
    assert "only-here" not in cluster.kubectl("get", "namespaces")
    assert "other-image:1 is ready" in run(
        "load-image", "other-image:1", "--path", str(Path(sys.executable).parent)
    )
    apply(other, "only-here", pod("p", "sleep", "1000", image="other-image:1"))
    wait_ready(other, "only-here", "p")
    assert len(processes_of(directory)) >= 8
    began = time.monotonic()
    assert "The cluster is down" in run("down")
    assert time.monotonic() - began < 60
    assert_nothing_left(directory)
    assert "No cluster was running" in run("down")
    assert "Ready" in cluster.kubectl("get", "nodes")


@pytest.mark.parametrize("moment", ["etcd", "kube-apiserver", "node"])
def test_up_killed_in_the_middle_leaves_nothing(directory: Path, moment: str) -> None:
    process = start_up(directory)
    read_until(process, moment)
    process.kill()
    process.communicate()
    if moment != "node":  # by then `up` may already have said that the cluster shall stay
        until(lambda: not processes_of(directory), 60, "the end of all processes, without any `down`")
    Cluster(directory).down()
    assert_nothing_left(directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_interrupted_clears_up_after_itself(directory: Path, number: signal.Signals) -> None:
    process = start_up(directory)
    read_until(process, "etcd")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "stopped")
    assert_nothing_left(directory)


def test_a_cluster_ends_with_the_process_it_is_tied_to(directory: Path) -> None:
    script = (
        f"import sys, time; from localcluster import Cluster; c = Cluster({str(directory)!r}); "
        "c.up(detached=False); print('up', flush=True); time.sleep(1000)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        assert Cluster(directory).is_running()
        owner.kill()
    until(lambda: not processes_of(directory), 60, "the end of all processes")


def test_up_works_again_after_a_crash(directory: Path) -> None:
    crashed = Cluster(directory)
    crashed.up()
    record = json.loads(Layout(directory).record.read_text())
    os.kill(record["init"]["pid"], signal.SIGKILL)
    until(lambda: not processes_of(directory) and not crashed.is_running(), 60, "the end of all processes")
    with pytest.raises(NotRunningError, match="no cluster runs in"):
        crashed.status()
    crashed.up()
    assert "Ready" in crashed.kubectl("get", "nodes")


def test_down_never_kills_a_stranger(directory: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        own = identify(stranger.pid)
        assert own is not None
        layout = Layout(directory)
        layout.run.mkdir()
        # The cluster's process has gone, and its number has been given to someone else.
        Record(Identity(own.pid, own.started - 1, own.boot)).write(layout.record)
        assert not Cluster(directory).down()
        assert stranger.poll() is None
        stranger.kill()


def test_only_one_command_works_on_a_directory_at_a_time(directory: Path) -> None:
    process = start_up(directory)
    read_until(process, "etcd")
    with pytest.raises(AlreadyRunningError, match="another `localcluster up` or `down`"):
        Cluster(directory).down()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_where_namespaces_are_forbidden_the_error_says_what_to_do(directory: Path) -> None:
    up = f"{sys.executable} -m localcluster --dir {directory} up"
    # The limit of a user namespace made for this test: nothing of the machine changes.
    script = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {up}"
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", script]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "error: this machine does not allow user namespaces to an ordinary user" in result.stderr
    assert "set KUBECONFIG to its kubeconfig file" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_component_that_cannot_start_is_named_with_its_log(directory: Path) -> None:
    broken = directory / "broken-etcd"
    broken.write_text("#!/bin/sh\necho no space for me >&2\nexit 1\n")
    broken.chmod(0o755)
    cluster = Cluster(directory, replacements={"etcd": broken})
    with pytest.raises(LocalClusterError, match=r"etcd ended while starting[^§]*no space for me"):
        cluster.up()
    broken.unlink()
    assert_nothing_left(directory)


def test_a_forward_reaches_ready_endpoints_from_the_host(cluster: Cluster, namespace: str) -> None:
    script = (
        "import http.server, os\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "        self.wfile.write(os.environ['HOSTNAME'].encode())\n"
        "http.server.HTTPServer(('', 8000), H).serve_forever()"
    )
    ready = {"readinessProbe": {"httpGet": {"port": 8000}, "periodSeconds": 1}}
    for name in ("a", "b"):
        made = pod(name, "python", "-c", script, image="python:3", container=ready)
        made["metadata"]["labels"] = {"app": "names"}
        apply(cluster, namespace, made)
    apply(cluster, namespace, service("names", "names", 80, 8000))
    wait_ready(cluster, namespace, "a", "b")

    def ask(address: str) -> str:
        with urllib.request.urlopen(f"http://{address}/", timeout=60) as response:
            return str(response.read().decode())

    with Forward(cluster.directory, namespace, "names", 80) as forward:
        until(lambda: {ask(forward.address) for _ in range(4)} == {"a", "b"}, 60, "answers of both pods")
        cluster.kubectl("delete", "pod", "-n", namespace, "a")
        assert {ask(forward.address) for _ in range(4)} == {"b"}
    with pytest.raises(OSError, match="refused"):
        ask(forward.address)
    with pytest.raises(ForwardError, match=r"has no TCP port 81; its ports: 80"):
        Forward(cluster.directory, namespace, "names", 81)
    with pytest.raises(ForwardError, match=f"services in namespace {namespace}: {namespace}/names"):
        Forward(cluster.directory, namespace, "nobody", 80)
