"""Garbage collections of processes that serve visit only what is new."""

import gc
from types import SimpleNamespace

from moe_worker.config.engine import EngineOptions
from moe_worker.engine import following
from moe_worker.garbage import collect_rarely, spare_loaded
from moe_worker.kvcache.pages import PagePool
from moe_worker.kvcache.prefix import PrefixTree
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


def full_collections_while_a_cache_fills(pages=40_000, each=50):
    before, tree = gc.get_stats()[2]["collections"], PrefixTree(pool := PagePool(pages), 1)
    for first in range(0, pages, each):
        tokens = list(range(first, first + each))
        node, _ = tree.match(tokens)
        tree.release(tree.insert(node, tokens, pool.take(each))[0])
    return gc.get_stats()[2]["collections"] - before


def test_a_cache_that_fills_stops_no_stream_for_a_full_collection():
    usual = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # Python's own: engines of other tests have changed it
    try:
        spare_loaded()
        gc.collect()  # Python puts off full ones until a quarter more objects than in the last one are old
        assert full_collections_while_a_cache_fills() > 0
        collect_rarely()
        assert full_collections_while_a_cache_fills() == 0
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def test_a_rank_leaves_its_part_out_before_it_is_ready(monkeypatch):
    seen, runner = [], MeshRunner.__new__(MeshRunner)
    monkeypatch.setattr(following, "load", lambda *_, **__: SimpleNamespace(runner=runner, format="w4a8"))
    monkeypatch.setattr(runner, "follow", lambda: seen.append("follows"), raising=False)
    monkeypatch.setattr(gc, "freeze", lambda: seen.append("freezes"))
    options = EngineOptions(device="cpu", mesh="1x2", mesh_leader="127.0.0.1:1", mesh_rank=1)
    following.follow("checkpoint", options, seen.append)
    assert seen == ["freezes", "w4a8", "follows"]
