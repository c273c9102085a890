"""The real helm, and a cluster of its own for the chart in which every request is written down."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from localcluster import Cluster
from tests.operator.live import Live, manifest

CHART = Path(__file__).parents[2] / "charts/moe-operator"
RELEASE = "moe-operator"
ROOTS = ("--set", "modelRoots={/mnt/models}")
NAMESPACE = "moe-system"


class HelmError(Exception):
    """helm ended with an error; the text is what it said."""


@dataclass(frozen=True)
class Helm:
    cluster: Cluster
    home: Path

    def __call__(self, *words: str) -> str:
        """Runs helm and returns what it printed."""
        folders = {f"HELM_{name}_HOME": str(self.home / name) for name in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [self.cluster.directory / "bin/helm", *words, "--namespace", NAMESPACE],
            env={**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig), **folders},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise HelmError(done.stderr)
        return done.stdout

    def install(self, *settings: str) -> str:
        return self("install", RELEASE, str(CHART), "--wait", "--timeout=120s", *ROOTS, *settings)

    def upgrade(self, *settings: str) -> str:
        return self("upgrade", RELEASE, str(CHART), "--wait", "--timeout=120s", *ROOTS, *settings)


@pytest.fixture(scope="package")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster without an operator, whose API server keeps an audit log."""
    running = Cluster(tmp_path_factory.mktemp("chart"), extra_tools=["helm"], audit=True)
    running.up(detached=False)
    yield running
    running.down()


@pytest.fixture(scope="package")
def helm(audited: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """helm, in a cluster where the operator's namespace admits only pods of the standard "restricted"."""
    audited.kubectl("create", "namespace", NAMESPACE)
    level = "pod-security.kubernetes.io/enforce=restricted"
    audited.kubectl("label", "namespace", NAMESPACE, level)
    return Helm(audited, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="package")
def installed(helm: Helm) -> str:
    """The release; what helm said when it was installed."""
    return helm.install()


@pytest.fixture(scope="package")
def docs(audited: Cluster, installed: str) -> Live:
    """A deployment of two replicas that is Ready."""
    audited.kubectl("create", "namespace", "users")
    live = Live(audited, "users")
    live.apply(manifest(replicas=2))
    live.settled()
    return live
