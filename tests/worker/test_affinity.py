"""Experts of a domain on the same ranks: what a swap of places may do, and what it is for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_worker.mesh.affinity import gathered, ranks_used
from moe_worker.mesh.placement import Topology, placement, rank_loads


def test_domains_that_share_no_expert_get_ranks_of_their_own():
    """Four domains whose experts lie on all ranks at first."""
    shares = [[0.25 if expert % 4 == domain else 0.0 for expert in range(16)] for domain in range(4)]
    places = gathered(range(16), shares, [1.0] * 16, 4, 6)
    assert [len({expert % 4 for expert in places[rank * 4 : rank * 4 + 4]}) for rank in range(4)] == [1] * 4
    assert ranks_used(range(16), shares, 4, 6) == pytest.approx(4 * (1 - 0.75**6))
    assert ranks_used(places, shares, 4, 6) == 1


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
    assert max(rank_loads(loads, after, 4)) <= limit * (1 + 1e-9)
    each = len(before) // 4
    assert twice(after, each) <= twice(before, each)


def twice(places, each):
    """Copies of an expert on a rank that already has one."""
    return sum(each - len(set(places[first : first + each])) for first in range(0, len(places), each))


def test_copies_count_evenly():
    """An expert with a copy on each of two ranks is used on one of them by half of the tokens."""
    assert ranks_used((0, 1, 0, 2), [[1.0, 0.0, 0.0]], 2, 1) == pytest.approx(1.0)
    assert ranks_used((0, 1, 0, 2), [[0.5, 0.25, 0.25]], 2, 2) == pytest.approx(2 * (1 - 0.5**2))
