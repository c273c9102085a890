"""Fixtures that every part's tests may use: a running local cluster, and a namespace of one's own in it."""

import secrets
from collections.abc import Iterator

import pytest

from localcluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Kubernetes, started once for all tests (about 7 s); it ends with the test process at last."""
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
