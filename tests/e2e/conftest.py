import secrets
from collections.abc import Iterator

import pytest

from localcluster import Cluster
from tests.e2e.serving import ROOT, Served, eventually


@pytest.fixture(scope="session")
def served(operator: Cluster) -> Iterator[Served]:
    """The example with two replicas, ready, its traces sent to a collector in the cluster."""
    operator.kubectl("apply", "-f", str(ROOT / "examples/collector.yaml"))
    namespace = f"e2e-{secrets.token_hex(4)}"
    operator.kubectl("create", "namespace", namespace)
    deployment = Served(operator, namespace)
    deployment.apply("docs-moe", "file:///mnt/models/docs-moe")
    eventually(lambda: deployment.ready().get("status") == "True", "docs-moe Ready", 120)
    yield deployment
    operator.kubectl("delete", "namespace", namespace, "observability", "--wait=false")
