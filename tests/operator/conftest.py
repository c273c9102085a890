"""The operator, installed once for all of its tests as users install it: as a pod under its own account."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from localcluster import Cluster
from tests.operator.live import ROOT, Live


@pytest.fixture(scope="session")
def api(cluster: Cluster) -> Cluster:
    """A cluster that knows MoEDeployments."""
    cluster.kubectl("apply", "-f", str(ROOT / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/moedeployments.serving.moe-operator.dev")
    return cluster


@pytest.fixture(scope="session")
def operator(api: Cluster) -> Cluster:
    """A cluster in which the operator runs."""
    api.kubectl("apply", "-f", str(ROOT / "charts/install.yaml"))
    api.kubectl("-n", "moe-system", "rollout", "status", "deployment/moe-operator", "--timeout=90s")
    return api


@pytest.fixture(scope="module")
def live(operator: Cluster) -> Iterator[Live]:
    """A namespace for one module's tests."""
    name = f"operator-{secrets.token_hex(4)}"
    operator.kubectl("create", "namespace", name)
    yield Live(operator, name)
    operator.kubectl("delete", "namespace", name, "--wait=false")
