"""Fixtures that every part's tests may use: a running local cluster, and a namespace of one's own in it."""

import contextlib
import functools
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

from localcluster import Cluster
from localcluster.errors import CommandError
from moe_worker.kernels.cpu import build

ROOT = Path(__file__).parents[1]
CLUSTER_FILES = (
    *("chart/", "localcluster/", "soak/", "frontend/test_in_cluster.py"),
    *("e2e/test_gang.py", "e2e/test_line.py", "e2e/test_transport.py"),
    *("operator/test_api.py", "operator/test_applied_again.py", "operator/test_certificates.py"),
    *("operator/test_lost.py", "operator/test_mounting.py", "operator/test_processes.py"),
    *("operator/test_reconcile.py", "operator/test_restricted_cluster.py", "operator/test_rollout_live.py"),
    *("operator/test_scaling_cluster.py", "operator/test_waiting.py"),
)
"""Where tests in clusters are. Only `CLUSTERS` processes run these files."""
CLUSTERS = 2
COMPUTING = (
    *("compress/", "operator/autoscaling_model/", "recipe/", "train/"),
    *("packaging/test_dependencies.py", "packaging/test_image.py"),
    *("worker/test_interpreted.py", "worker/test_invariance.py"),
)
"""Whose tests only compute and depend on no clock: `make test` runs them next to all others."""
LONGEST = (
    *("chart/test_life.py", "chart/test_rights.py"),
    *("e2e/test_line.py", "operator/test_rollout_live.py", "operator/test_reconcile.py"),
    *("e2e/test_transport.py", "localcluster/test_lifecycle.py", "localcluster/test_workloads.py"),
    *("operator/test_scaling_cluster.py", "e2e/test_gang.py"),
    *("worker/test_mesh.py", "worker/test_service.py", "worker/test_output_formats.py"),
    *("worker/test_model.py", "operator/test_fuzz.py", "worker/test_mesh_recovery.py"),
)
"""They begin first, so that at the end no process waits for another one's long file."""


# Tests start hundreds of Python processes; without bytecode each compiles torch and grpc again, for seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Tensors this small only wait for one another's threads, for minutes where the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline for each example fails wherever other processes use the machine; tests have a limit as a whole.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


def pytest_configure() -> None:
    """Lets SIGINT through: background jobs ignore it, and so would every process that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Imports no file of which `-m "computing and ..."` or `-m "... not computing ..."` takes no test."""
    chosen = re.search(r"(not )?\bcomputing\b", config.option.markexpr)
    if collection_path.is_dir() or chosen is None:
        return None
    return (_file(collection_path).startswith(COMPUTING) is (chosen[1] is not None)) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what happens in clusters and what only computes; puts clusters first, then long files."""
    items.sort(key=_rank)
    for item in items:
        file = _file(item.path)
        if file.startswith(COMPUTING):
            item.add_marker(pytest.mark.computing)
        if "cluster" in getattr(item, "fixturenames", ()) or file.startswith(("chart/", "localcluster/")):
            if not file.startswith(CLUSTER_FILES):
                raise pytest.UsageError(f"{item.nodeid} needs a cluster: name its file in CLUSTER_FILES")
            item.add_marker(pytest.mark.cluster)


class FileScheduling(LoadFileScheduling):
    """One process runs a file, and one all of tests/chart: its cluster with a release takes 40 s.

    The first processes that get a file in CLUSTER_FILES run all of these, and then others.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self._with_cluster: set[WorkerController] = set()

    def _split_scope(self, nodeid: str) -> str:
        folder = "tests/chart"
        return folder if nodeid.startswith(f"{folder}/") else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        for scope in self.workqueue:
            needs_cluster = f"{scope}/".startswith(tuple(f"tests/{file}" for file in CLUSTER_FILES))
            if needs_cluster and not self._may_have_cluster(node):
                continue
            if needs_cluster:
                self._with_cluster.add(node)
            self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)
            return
        node.shutdown()  # after what it has

    def _may_have_cluster(self, node: WorkerController) -> bool:
        self._with_cluster.intersection_update(self.nodes)
        return node in self._with_cluster or len(self._with_cluster) < CLUSTERS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling | None:
    """Distributes tests for `--dist loadfile`."""
    return FileScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@functools.cache
def _file(path: Path) -> str:
    """Relative to this folder."""
    return str(path.relative_to(ROOT / "tests"))


def _rank(item: pytest.Item) -> tuple[bool, int]:
    file = _file(item.path)
    return not file.startswith(CLUSTER_FILES), LONGEST.index(file) if file in LONGEST else len(LONGEST)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Kubernetes, started once for all tests (about 7 s); it ends with the test process at last."""
    with contextlib.suppress(build.BuildError):  # without a compiler, pods compute with plain torch
        build.install()  # of sources that have changed: else each pod would compile them, for 20 s
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    running.up(detached=False)
    yield running
    running.down()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A new Kubernetes namespace, deleted after the test (without waiting for it)."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def api(cluster: Cluster) -> Cluster:
    """A cluster that knows MoEDeployments."""
    crds = str(ROOT / "crds")
    cluster.kubectl("apply", "-f", crds)
    # `kubectl wait` fails on a condition while there are none at all.
    cluster.kubectl("wait", "--for=jsonpath={.status.conditions}", "-f", crds)
    cluster.kubectl("wait", "--for=condition=Established", "-f", crds)
    _until_served(cluster, "moedeployments,frontendroutes,scalinghistories")
    return cluster


def _until_served(cluster: Cluster, kinds: str, seconds: float = 60.0) -> None:
    """Waits until the API server answers requests for these kinds, which is a little after Established."""
    end = time.monotonic() + seconds
    while True:
        try:
            cluster.kubectl("get", kinds)
        except CommandError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="session")
def operator(api: Cluster) -> Cluster:
    """A cluster in which the operator runs, installed as users install it: as a pod under its own account."""
    # Tests serve models from directories of their own, too, and do not wait for minutes for a retry.
    settings = (
        f'value: "/mnt/models,{tempfile.gettempdir()}"',
        "- {name: MOE_OPERATOR_RETRY_MOST_SECONDS, value: '2'}",
    )
    install = (ROOT / "charts/install.yaml").read_text()
    changed = install.replace('value: "/mnt/models"', f"\n{' ' * 12}".join(settings))
    api.kubectl("apply", "-f", "-", input=changed)
    api.kubectl("-n", "moe-system", "rollout", "status", "deployment/moe-operator", "--timeout=90s")
    return api
