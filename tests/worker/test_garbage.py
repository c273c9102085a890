"""Garbage collections of processes that serve visit only what is new."""

import gc
from types import SimpleNamespace

from moe_worker.config.engine import EngineOptions
from moe_worker.engine import following
from moe_worker.garbage import spare_loaded
from moe_worker.mesh.runner import MeshRunner


def test_what_is_loaded_is_left_out_of_collections():
    loaded = [[] for _ in range(1000)]
    try:
        spare_loaded()
        new = []
        visited = {id(each) for each in gc.get_objects()}
        assert id(new) in visited
        assert not visited.intersection(map(id, loaded))
    finally:
        gc.unfreeze()


def test_a_rank_leaves_its_part_out_before_it_is_ready(monkeypatch):
    seen, runner = [], MeshRunner.__new__(MeshRunner)
    monkeypatch.setattr(following, "load", lambda *_, **__: SimpleNamespace(runner=runner, format="w4a8"))
    monkeypatch.setattr(runner, "follow", lambda: seen.append("follows"), raising=False)
    monkeypatch.setattr(gc, "freeze", lambda: seen.append("freezes"))
    options = EngineOptions(device="cpu", mesh="1x2", mesh_leader="127.0.0.1:1", mesh_rank=1)
    following.follow("checkpoint", options, seen.append)
    assert seen == ["freezes", "w4a8", "follows"]
