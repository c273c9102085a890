"""A namespace in which the installed operator works on stand-in workers, and an API server alone."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import yaml

from localcluster import Cluster
from tests.frontend.apiserver import ApiServer, running_api_server
from tests.operator.by_hand import CRDS, Api
from tests.operator.live import ROOT, Live, eventually


@pytest.fixture(scope="module")
def live(operator: Cluster) -> Iterator[Live]:
    """A namespace for one module's tests."""
    name = f"operator-{secrets.token_hex(4)}"
    operator.kubectl("create", "namespace", name)
    yield Live(operator, name)
    operator.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real API server that knows MoEDeployments; nobody acts on what is written there but the tests."""
    with running_api_server(tmp_path_factory.mktemp("apiserver")) as server:
        api = Api(server)
        bodies = [
            body for path in (ROOT / "crds").glob("*.yaml") for body in yaml.safe_load_all(path.read_text())
        ]
        for body in bodies:
            code, answer = api.ask("POST", CRDS, body)
            assert code == 201, answer["message"]
        for body in bodies:  # each begins to be stored at a time of its own
            spec = body["spec"]
            collection = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
            eventually(
                lambda at=collection: api.ask("GET", at)[0], lambda code: code == 200, "the CRD is served"
            )
        yield server
