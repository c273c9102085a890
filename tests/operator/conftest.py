"""A namespace in which the installed operator works on stand-in workers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from localcluster import Cluster
from tests.operator.live import Live


@pytest.fixture(scope="module")
def live(operator: Cluster) -> Iterator[Live]:
    """A namespace for one module's tests."""
    name = f"operator-{secrets.token_hex(4)}"
    operator.kubectl("create", "namespace", name)
    yield Live(operator, name)
    operator.kubectl("delete", "namespace", name, "--wait=false")
