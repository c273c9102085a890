"""A mesh on the Triton kernels gives what the kernels of one process give. Triton interprets them here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.worker.mesh_ranks import free_address

pytest.importorskip("triton")

from benchmarks.gpu_random import SMALL, RandomSource, config_of
from moe_worker.config.mesh import MeshShape
from moe_worker.mesh.dispatch import PlaceTable
from moe_worker.mesh.fixed import FixedExchange, capacity_for
from moe_worker.models.build import build_model
from moe_worker.models.cuda_build import prepare
from moe_worker.models.cuda_layer import stored_tensors

ROOT = Path(__file__).parents[2]
SECONDS = 1200  # interpreted kernels take most of it
CASES = [
    ("1x2", ["dense", "w4a8", "overflow", "moved", "settled", "large", "uneven"]),
    ("2x1", ["dense", "w4a8", "uneven"]),
]
FOUR_RANKS = [("2x2", ["dense", "w4a8", "uneven"]), ("1x4", ["dense", "w4a8", "uneven"])]


def test_capacity_is_what_balanced_routing_needs_and_a_margin():
    assert capacity_for(20, 32, 8) == 20  # too few for less than all to be worth it
    assert capacity_for(1000, 2, 6) == 1000  # nearly every token needs both ranks
    assert capacity_for(1000, 32, 8) == 280  # 1 - (31 / 32) ** 8 = 0.224 of them, and a quarter more
    assert all(capacity_for(tokens, 8, 8) <= tokens for tokens in range(1, 300))


def addresses(exchange):
    return [each.data_ptr() for each in (exchange._places.places_AN, exchange._places.copies_A)]


def test_experts_that_move_are_found_at_the_addresses_that_graphs_hold():
    """Also where an expert gets more copies than any had before."""
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    most, here = torch.zeros(1, dtype=torch.int32), torch.device("cpu")
    exchange = FixedExchange(PlaceTable([0, 1, 2, 2, 1, 0], 3, 2, here), 3, group, most)
    before = addresses(exchange)
    for places in ([0, 0, 0, 0, 1, 2], [2, 1, 0, 0, 1, 2]):
        table = PlaceTable(places, 3, 2, here)
        exchange.place(table)
        assert addresses(exchange) == before
        for expert, count in enumerate(table.copies_A[:-1].tolist()):
            assert exchange._places.copies_A[expert] == count
            found = exchange._places.places_AN[expert, :count].tolist()
            assert found == [place for place, each in enumerate(places) if each == expert]


def test_an_exchange_goes_on_between_the_ranks_that_are_left():
    """Rank 1 of three is lost; rank 2 becomes the second of two, and then all are back."""

    def group(own, size):
        return SimpleNamespace(rank=lambda: own, size=lambda: size)

    most, here = torch.zeros(1, dtype=torch.int32), torch.device("cpu")
    everyone, left = [0, 1, 2, 3, 1, 0], [0, 1, 1, 0]
    exchange = FixedExchange(PlaceTable(everyone, 4, 3, here), 2, group(2, 3), most)
    for places, own, size in ((left, 1, 2), (everyone, 2, 3)):
        table = PlaceTable(places, 4, size, here)
        exchange.rejoin(group(own, size))
        exchange.place(table)
        found = exchange._places
        assert (found.own, found.ranks, found.each) == (own, size, 2)
        assert found.places_AN.shape[1] >= table.places_AC.shape[1]
        for expert in set(places):
            at = found.places_AN[expert, : found.copies_A[expert]].tolist()
            assert at == [place for place, each in enumerate(places) if each == expert]


@pytest.mark.parametrize("number_format", ["dense", "fp8", "w4a16", "w4a8"])
def test_a_layer_takes_other_experts_into_the_memory_of_its_own(number_format):
    """Graphs read the new ones where the old ones were; experts of another shape are refused."""

    def layer_of(seed, values=SMALL):
        source = RandomSource(torch.device("cpu"), torch.bfloat16, number_format, seed)
        return prepare(build_model(config_of(values | {"num_hidden_layers": 2}), source, 16)).layers[1]

    layer, other = layer_of(0), layer_of(1)
    own, new = ([*stored_tensors(each.gate_up), *stored_tensors(each.down)] for each in (layer, other))
    before, kept = [each.data_ptr() for each in own], [each.clone() for each in own]
    layer.take_experts({3: other.expert_at(5)})
    assert [each.data_ptr() for each in own] == before
    for each, old, source in zip(own, kept, new, strict=True):
        assert torch.equal(each[3], source[5])
        assert not torch.equal(each[3], old[3])
        assert torch.equal(each[[0, 1, 2, *range(4, len(each))]], old[[0, 1, 2, *range(4, len(old))]])
    pairs = zip(layer.fitting_expert(other.gate_up, other.down), other.expert_at(0), strict=True)
    assert all(one.data_ptr() == another.data_ptr() for one, another in pairs)
    wider = layer_of(1, SMALL | {"moe_intermediate_size": 256})
    with pytest.raises(ValueError, match="an expert of shape"):
        layer.fitting_expert(wider.gate_up, wider.down)


def found_by_ranks(folder, mesh, cases, environment):
    """What tests.worker.kernel_ranks finds in a process for each rank."""
    address, file = free_address(), folder / "found"
    command = [sys.executable, "-m", "tests.worker.kernel_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), mesh, address, str(file), *cases], cwd=ROOT, env=os.environ | environment
        )
        for rank in range(MeshShape.parse(mesh).ranks)
    ]
    try:
        assert [rank.wait(SECONDS) for rank in ranks] == [0] * len(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return json.loads(file.read_text())


def check(found, mesh):
    """Each rank of a stage rounds its sum of experts to bf16 before they are added; 2x1 adds no rounding."""
    limit = 0.0 if mesh == "2x1" else 0.02
    for case in found.values():
        assert all(worst <= limit for _, worst in case["differences"]), found
    if "moved" in found:
        assert found["moved"]["moved"] == [1]
        mesh_errors, alone = found["settled"]["errors"]  # against float32
        assert mesh_errors["median"] < 1.25 * alone["median"]
    same, tokens = found["uneven"]["tokens"]
    assert same == tokens
    assert found["dense"]["ours"] == found["dense"]["ahead"]
    assert found["dense"]["ours"][1] == found["dense"]["alone"][1]  # every token is counted once
    if mesh == "2x1":
        assert found["dense"]["ours"] == found["dense"]["alone"]


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(("mesh", "cases"), CASES + FOUR_RANKS, ids=str)
def test_a_mesh_computes_what_one_process_computes(tmp_path, mesh, cases):
    """Prompts, mixed steps, decode steps, and shards without tokens; engines one and two steps ahead."""
    check(found_by_ranks(tmp_path, mesh, cases, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}), mesh)
