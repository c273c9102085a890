"""What a reconcile asks of pods: at the same time, so that those that do not respond cost one timeout."""

import threading
from types import SimpleNamespace

import pytest

from moe_operator.controller import planning
from moe_operator.controller.planning import Planning
from moe_operator.observed.observation import Observed
from moe_operator.observed.pods import Pod
from moe_operator.resources import names
from moe_operator.resources.status import ModelInfo
from moe_operator.rpc.dialing import PLAINTEXT
from moe_operator.settings import Settings
from tests.operator.worlds import deployment


@pytest.fixture
def meet(monkeypatch):
    """All calls of a step wait for each other: one after the other they would wait in vain."""
    barriers = {2: threading.Barrier(2), 3: threading.Barrier(3)}

    def answer(parties, result):
        def call(*_):
            barriers[parties].wait(5)
            return result

        return call

    monkeypatch.setattr(planning, "get_model", answer(2, ModelInfo(architecture="deepseek_v3")))
    monkeypatch.setattr(planning.MeshReader, "read", answer(2, {"docs-0-0": "mesh"}))
    monkeypatch.setattr(planning, "routed", answer(3, {"docs-0-0": "10.0.0.1"}))
    monkeypatch.setattr(planning, "download", answer(3, "half"))
    return answer(3, {"10.0.0.1": 7})


def made(active):
    return Planning(None, Settings(), None, active, PLAINTEXT)


def leader(of):
    revision = planning.revision(of)
    return Pod("docs-0-0", "10.0.0.1", True, False, revision, 0, None, shape="2x1", role=names.ROLE_WORKER)


def test_a_reconcile_asks_for_the_model_and_the_mesh_at_the_same_time(meet):
    of = deployment()
    seen, by = Observed(pods=(leader(of),)), made(meet)
    calls = [*by._of_meshes(seen), *by._of_model(of, seen)]
    found = planning._answered(seen, calls)
    assert (found.model.architecture, found.meshes) == ("deepseek_v3", {"docs-0-0": "mesh"})


def test_a_plan_asks_for_load_routes_and_downloads_at_the_same_time(meet):
    pods = (leader(deployment()),)
    found = made(meet)._asked(Observed(pods=pods), SimpleNamespace(choice=pods, unrouted=pods, fetching=pods))
    assert found.work == {"docs-0-0": 7}
    assert found.routed == {"docs-0-0": "10.0.0.1"}
    assert found.downloads == {"docs-0-0": "half"}


def test_nothing_is_asked_in_vain(meet):
    nothing = SimpleNamespace(choice=(), unrouted=(), fetching=())
    assert made(meet)._asked(Observed(), nothing) == Observed()
