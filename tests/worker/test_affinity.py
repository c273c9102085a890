"""Experts of a domain on the same ranks: what a swap of places may do, and what it is for."""

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.mesh.affinity import gathered
from moe_worker.mesh.placement import Topology, placement, rank_loads


def test_domains_that_share_no_expert_get_ranks_of_their_own():
    """Four domains whose experts lie on all ranks at first."""
    shares = [[0.25 if expert % 4 == domain else 0.0 for expert in range(16)] for domain in range(4)]
    places = gathered(range(16), shares, [1.0] * 16, 4, 2)
    assert [len({expert % 4 for expert in places[rank * 4 : rank * 4 + 4]}) for rank in range(4)] == [1] * 4
    assert ranks_used(range(16), shares, 4, 2) == pytest.approx(4 * 0.5)
    assert ranks_used(places, shares, 4, 2) == pytest.approx(1 - 0.5**4)


def ranks_used(places, shares, ranks, choices):
    """Ranks that hold a choice of a token, mean over domains, by the probabilities of `affinity`."""
    each, copies, total = len(places) // ranks, Counter(places), 0.0
    for domain in shares:
        needed = [min(choices * domain[expert] / copies[expert], 0.999) for expert in places]
        total += sum(
            1 - math.prod(1 - p for p in needed[first : first + each])
            for first in range(0, len(places), each)
        )
    return total / len(shares)


SHARES = st.integers(1, 4).flatmap(
    lambda domains: st.lists(
        st.lists(st.integers(0, 100), min_size=12, max_size=12).filter(any),
        min_size=domains,
        max_size=domains,
    )
)


@settings(deadline=None)
@given(SHARES, st.lists(st.integers(0, 1000), min_size=12, max_size=12), st.sampled_from([0, 4]))
def test_only_places_change_and_no_rank_has_more_than_its_limit(counts, loads, redundant):
    shares = [[each / sum(row) for each in row] for row in counts]
    (before,) = placement([loads], Topology(4), redundant)
    after = gathered(before, shares, loads, 4, 3, slack=0.1)
    assert Counter(after) == Counter(before)
    assert ranks_used(after, shares, 4, 3) <= ranks_used(before, shares, 4, 3) + 1e-9
    limit = max(*rank_loads(loads, before, 4), sum(loads) / 4 * 1.1)
    assert max(rank_loads(loads, after, 4)) <= limit * (1 + 1e-5)
    each = len(before) // 4
    assert twice(after, each) <= twice(before, each)


def twice(places, each):
    """Copies of an expert on a rank that already has one."""
    return sum(each - len(set(places[first : first + each])) for first in range(0, len(places), each))


def test_hundreds_of_experts_are_placed_in_a_fraction_of_a_second_and_tokens_go_to_fewer_ranks():
    """A layer of 256 experts and 32 copies on 32 ranks, learned from half of the tokens that are drawn."""
    draw, domains = np.random.default_rng(0), 16
    weights_NE = draw.dirichlet([0.25] * 256, size=domains)
    # The top 8 by Gumbel-perturbed logarithms are 8 draws without replacement.
    keys_NTE = np.log(weights_NE + 1e-30)[:, None] + draw.gumbel(size=(domains, 128, 256))
    learned_NTK, rest_NTK = np.split(keys_NTE.argpartition(-8)[..., -8:], 2, axis=1)
    shares_NE = np.stack([np.bincount(own.ravel(), minlength=256) / own.size for own in learned_NTK])
    loads = shares_NE.mean(0).tolist()
    (before,) = placement([loads], Topology(32, groups=8, apart=True), 32)
    began = time.thread_time()
    after = gathered(before, shares_NE.tolist(), loads, 32, 8)
    assert time.thread_time() - began < 1
    assert sent(rest_NTK.reshape(-1, 8), after) < 0.9 * sent(rest_NTK.reshape(-1, 8), before)


def test_more_places_than_any_model_has_stay_as_they_are():
    """A hostile checkpoint may have 65,536 experts, whose swaps would take 34 GB."""
    experts = 1 << 16
    assert gathered(range(experts), [[1 / experts] * experts], [1.0] * experts, 2, 8) == tuple(range(experts))


def sent(chosen_TK, places):
    """Ranks that a token goes to, mean, where the first of an expert's copies serves it."""
    homes = np.array([places.index(expert) // 9 for expert in range(256)])
    return np.mean([len(set(own)) for own in homes[chosen_TK].tolist()])
