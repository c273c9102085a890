"""Placement of experts and layers, compared with the example of DeepSeek's balancer and all other splits."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_worker.errors import SettingsError
from moe_worker.mesh.layers import layer_ranges
from moe_worker.mesh.placement import Topology, imbalance, placement

# The example of github.com/deepseek-ai/EPLB's README: two layers of 12 experts, 16 places, 8 GPUs on 2 nodes.
LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_hierarchical_placement_is_the_published_one():
    assert placement(LOADS, Topology(ranks=8, nodes=2, groups=4), redundant=4) == [
        (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
        (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
    ]


def test_global_placement_is_that_of_the_published_code():
    """What its rebalance_experts gives for the same loads on 3 nodes, over which 4 groups do not spread."""
    assert placement(LOADS, Topology(ranks=8, nodes=3, groups=4), redundant=4) == [
        (10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1),
        (1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7),
    ]


@given(st.data())
def test_every_expert_stands_somewhere_and_redundancy_does_not_hurt(data):
    ranks = data.draw(st.sampled_from([1, 2, 4, 8]))
    each = data.draw(st.integers(1, 6))
    loads = data.draw(st.lists(st.integers(0, 1000), min_size=ranks * each, max_size=ranks * each))
    redundant = ranks * data.draw(st.integers(0, 2))
    (places,) = placement([loads], Topology(ranks), redundant)
    assert len(places) == len(loads) + redundant
    assert set(places) == set(range(len(loads)))
    assert imbalance(loads, places, ranks) >= 1


def test_redundant_experts_even_out_a_skewed_load():
    skewed = [[1000.0 / (1 + expert) for expert in range(64)]]
    balance = [
        1 / imbalance(skewed[0], placement(skewed, Topology(8), redundant)[0], 8) for redundant in (0, 8)
    ]
    assert balance[0] < 0.65
    assert balance[1] > 0.93


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("each", range(1, 5))
def test_copies_of_an_expert_go_to_different_ranks(ranks, each):
    """With two of each expert, any rank may be lost."""
    experts = ranks * each
    (places,) = placement([[1.0] * experts], Topology(ranks, apart=True), experts)
    for lost in range(ranks):
        alive = places[: lost * 2 * each] + places[(lost + 1) * 2 * each :]
        assert set(alive) == set(range(experts))


def test_places_that_cannot_be_spread_are_refused():
    with pytest.raises(SettingsError, match="64 experts and 1 redundant ones cannot spread evenly over 8"):
        placement([[1.0] * 64], Topology(8), 1)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), stages=st.integers(1, 8),
    before=st.integers(0, 60), after=st.integers(0, 60),
)  # fmt: skip
def test_the_largest_stage_is_as_small_as_it_can_be(sizes, stages, before, after):
    if stages > len(sizes):
        with pytest.raises(SettingsError, match="use fewer stages"):
            layer_ranges(sizes, stages, before, after)
        return
    found = layer_ranges(sizes, stages, before, after)
    assert [layer for layers in found for layer in layers] == list(range(len(sizes)))
    assert len(found) == stages
    assert all(found)
    whole = [before * (i == 0) + size + after * (i == len(sizes) - 1) for i, size in enumerate(sizes)]
    cuts = itertools.combinations(range(1, len(sizes)), stages - 1)
    best = min(max(sum(whole[a:b]) for a, b in itertools.pairwise((0, *cut, len(sizes)))) for cut in cuts)
    assert max(sum(whole[layer] for layer in layers) for layers in found) == best
