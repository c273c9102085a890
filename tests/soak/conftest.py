"""A namespace in which the installed operator works on stand-in workers that count."""

from __future__ import annotations

from pathlib import Path

import pytest

from localcluster import Forward
from tests.operator.live import ROOT, Live, manifest
from tests.soak.load import Clients

PATH = f"{Path(__file__).with_name('standin')}:{ROOT}/.venv/bin:/usr/bin:/bin"


class Counting(Live):
    """A deployment of counting workers."""

    def deploy(self, name="docs", grace_s=5, **spec):
        worker = {
            "env": [{"name": "PATH", "value": PATH}],
            "terminationGracePeriodSeconds": grace_s,
        }
        # The counting workers speak plaintext.
        self.apply(manifest(name, worker=worker, transport={"mode": "Plaintext"}, **spec))

    def forward(self, name="docs"):
        return Forward(self.cluster.directory, self.namespace, f"{name}-frontend", 8000)

    def clients(self, forward, request, expected, count):
        return Clients(forward.address, request, expected, count)


@pytest.fixture
def counting_workers(operator, namespace):
    return Counting(operator, namespace)
