"""Eviction policies against models that we did not write them from, and against each other."""

import itertools
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.caching import POLICIES
from moe_api.caching.belady import Belady
from moe_api.caching.policy import KINDS, kind_of

KEYS = st.integers(0, 30)
TRACES = st.lists(st.tuples(KEYS, st.integers(0, KINDS - 1)), max_size=400)
CAPACITIES = st.integers(1, 12)


def hits_of(policy, capacity, trace):
    """Hits, and the keys evicted in order; fails where the policy breaks its contract."""
    resident, hits, evicted = set(), 0, []
    for key, kind in trace:
        if key in resident:
            hits += 1
            policy.hit(key, kind)
        else:
            if len(resident) == capacity:
                victim = policy.evict(key)
                resident.remove(victim)
                evicted.append(victim)
            policy.admit(key, kind)
            resident.add(key)
        assert len(policy) == len(resident) <= capacity
    return hits, evicted


def of_keys(text):
    return [(letter, 0) for letter in text]


def optimum(capacity, keys):
    """The most hits of any sequence of evictions, by trying all."""
    states = {frozenset(): 0}
    for key in keys:
        following = {}
        for resident, hits in states.items():
            if key in resident:
                choices, gained = [resident], 1
            elif len(resident) < capacity:
                choices, gained = [resident | {key}], 0
            else:
                choices, gained = [resident - {victim} | {key} for victim in resident], 0
            for choice in choices:
                following[choice] = max(following.get(choice, 0), hits + gained)
        states = following
    return max(states.values())


@pytest.mark.parametrize("name", POLICIES)
@given(capacity=CAPACITIES, trace=TRACES)
def test_a_policy_evicts_resident_keys_only_and_never_beats_belady(name, capacity, trace):
    hits, _ = hits_of(POLICIES[name](capacity), capacity, trace)
    best, _ = hits_of(Belady([key for key, _ in trace]), capacity, trace)
    assert hits <= best


@given(capacity=st.integers(1, 4), trace=st.lists(st.integers(0, 6), max_size=14))
def test_belady_is_the_optimum(capacity, trace):
    assert hits_of(Belady(trace), capacity, of_keys(trace))[0] == optimum(capacity, trace)


@given(capacity=CAPACITIES, trace=TRACES)
def test_lru_equals_an_ordered_dict(capacity, trace):
    model, evicted = OrderedDict(), []
    for key, _ in trace:
        if key not in model and len(model) == capacity:
            evicted.append(model.popitem(last=False)[0])
        model[key] = None
        model.move_to_end(key)
    assert hits_of(POLICIES["lru"](capacity), capacity, trace)[1] == evicted


@given(capacity=CAPACITIES, trace=TRACES)
def test_lru2_equals_the_definition_by_backward_distance(capacity, trace):
    """O'Neil 1993: the victim has the greatest distance to its last but one use; infinite ones by LRU."""
    uses, resident, history, evicted = {}, set(), OrderedDict(), []
    for now, (key, _) in enumerate(trace):
        if key not in resident:
            if len(resident) == capacity:
                victim = min(resident, key=lambda k: (uses[k][-2] if len(uses[k]) > 1 else -1, uses[k][-1]))
                resident.remove(victim)
                evicted.append(victim)
                history[victim] = None
                if len(history) > capacity:
                    uses.pop(history.popitem(last=False)[0])
            history.pop(key, None)
            resident.add(key)
        # A key keeps its last use only when it is evicted.
        earlier = uses.get(key, [])[-1:]
        uses[key] = [*earlier, now]
    assert hits_of(POLICIES["lru2"](capacity), capacity, trace)[1] == evicted


def test_sieve_follows_the_example_of_its_paper():
    """NSDI 2024, figure 1: the queue holds G(1) F E D C(1) B(1) A(1) when H comes, the hand being at A."""
    trace = of_keys("ABCDEFG" + "ABCG" + "HADIBJ")
    hits, evicted = hits_of(POLICIES["sieve"](7), 7, trace)
    # H: A, B, C lose their marks, D is evicted. A hits. D comes again: E goes. I: F goes. B hits. J: G is
    # marked and spared, then the hand goes on to H, which nobody used.
    assert evicted == ["D", "E", "F", "H"]
    assert hits == 4 + 2


def test_s3fifo_keeps_one_hit_wonders_out_of_the_main_queue():
    policy = POLICIES["s3fifo"](10)
    _, evicted = hits_of(policy, 10, of_keys([*"aabbccaabbcc", *range(40)]))
    assert not set("abc") & set(evicted)


def test_s3fifo_admits_a_remembered_key_to_the_main_queue():
    policy = POLICIES["s3fifo"](4)
    hits_of(policy, 4, of_keys("abcde"))
    assert policy.evict("a") == "b"
    policy.admit("a")
    for key in "fgh":
        if len(policy) == 4:
            assert policy.evict(key) != "a"
        policy.admit(key)


def test_arc_resists_a_scan_that_washes_lru_out():
    """The example of the FAST paper's introduction: a scan of new keys leaves those used twice alone."""
    trace = of_keys([*"abcabc", *range(20), *"abc"])
    assert hits_of(POLICIES["arc"](6), 6, trace)[0] == 6
    assert hits_of(POLICIES["lru"](6), 6, trace)[0] == 3


def test_arc_moves_its_target_by_hits_among_evicted_names():
    policy = POLICIES["arc"](2)
    hits_of(policy, 2, of_keys("aab"))
    assert policy.evict("c") == "b"  # the target of T1 is 0
    policy.admit("c")
    assert policy.evict("b") == "a"  # b is in B1: recency deserves more, so T2 gives up its key
    policy.admit("b")


def test_the_adaptive_policy_learns_which_keys_come_back():
    """One class of access never returns; LRU lets it wash the others out."""
    once = itertools.count(1000)
    useful, scan = kind_of(8), kind_of(2000)
    trace = []
    for round_ in range(1000):
        trace += [(round_ % 50, useful), *((next(once), scan) for _ in range(4))]
    lru, _ = hits_of(POLICIES["lru"](100), 100, trace)
    adaptive, _ = hits_of(POLICIES["moe"](100), 100, trace)
    assert lru == 0
    assert adaptive >= 500


@pytest.mark.parametrize("name", POLICIES)
@given(capacity=CAPACITIES, trace=TRACES, gone=st.sets(KEYS))
def test_removed_keys_are_never_evicted(name, capacity, trace, gone):
    policy, resident = POLICIES[name](capacity), set()
    for key, kind in trace:
        if key in resident:
            policy.hit(key, kind)
            if key in gone:
                policy.remove(key)
                resident.remove(key)
        else:
            if len(resident) == capacity:
                resident.remove(policy.evict(key))
            policy.admit(key, kind)
            resident.add(key)
    while resident:
        resident.remove(policy.evict(-1))
    assert len(policy) == 0
    with pytest.raises(KeyError):
        policy.evict(-1)


@given(st.integers(0, 10**6), st.integers(0, 1000), st.booleans())
def test_kinds_are_in_range(answer, origin, last):
    assert 0 <= kind_of(answer, origin, last=last) < KINDS
