"""Routing by itself: time and loads in, decisions out."""

import collections

from hypothesis import given
from hypothesis import strategies as st

from moe_frontend.policy import routing
from moe_frontend.policy.routing import Load, choose, is_suspect

loads = st.lists(
    st.builds(
        Load,
        name=st.integers(0, 20).map("w-{}".format),
        in_flight=st.integers(0, 5),
        last_chosen=st.integers(0, 100),
        failures=st.integers(0, 5),
        failed_at=st.floats(0, 20),
        elsewhere=st.integers(0, 5),
    ),
    unique_by=lambda load: load.name,
    max_size=8,
)


@given(loads, st.frozensets(st.integers(0, 20).map("w-{}".format)), st.floats(20, 40))
def test_the_choice_is_the_least_loaded_of_the_best_that_were_not_tried(candidates, tried, now):
    decision = choose(candidates, tried, now)
    left = [load for load in candidates if load.name not in tried]
    if not left:
        assert decision is None
        return
    chosen = next(load for load in left if load.name == decision.replica)
    peers = [load for load in left if is_suspect(load, now) == is_suspect(chosen, now)]
    assert chosen.in_flight + chosen.elsewhere == min(load.in_flight + load.elsewhere for load in peers)
    assert not is_suspect(chosen, now) or all(is_suspect(load, now) for load in left)
    assert decision.candidates == len(left)
    assert decision.replica in decision.message


@given(st.integers(1, 8), st.integers(0, 200))
def test_load_stays_even_and_ties_go_round(replicas, requests):
    state = {f"w-{i}": Load(f"w-{i}") for i in range(replicas)}
    for number in range(1, requests + 1):
        name = choose(state.values(), frozenset(), 0.0).replica
        state[name] = Load(name, state[name].in_flight + 1, number)
    counts = [load.in_flight for load in state.values()]
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.booleans(), max_size=60))
def test_requests_that_end_at_once_are_spread_over_all(pattern):
    state = {f"w-{i}": Load(f"w-{i}") for i in range(3)}
    chosen = collections.Counter()
    for number, _ in enumerate(pattern, 1):
        name = choose(state.values(), frozenset(), 0.0).replica
        chosen[name] += 1
        state[name] = Load(name, 0, number)
    assert max(chosen.values(), default=0) - min((chosen[n] for n in state), default=0) <= 1


def test_a_failed_replica_comes_last_and_is_forgiven():
    failed = Load("bad", failures=1, failed_at=100.0)
    busy = Load("good", in_flight=50)
    assert choose([failed, busy], frozenset(), 100.4).replica == "good"
    assert choose([failed, busy], frozenset(), 100.5).replica == "bad"


@given(st.integers(1, 10_000))
def test_suspicion_grows_to_ten_seconds(failures):
    load = Load("w", failures=failures, failed_at=0.0)
    assert is_suspect(load, 0.49)
    assert is_suspect(load, 9.99) == (failures >= 6)
    assert not is_suspect(load, 10.0)


def test_when_all_failed_one_is_tried_all_the_same():
    both = [Load("a", in_flight=2, failures=9, failed_at=0.0), Load("b", failures=9, failed_at=0.0)]
    decision = choose(both, frozenset(), 1.0)
    assert (decision.replica, decision.reason) == ("b", "AllSuspect")


def test_attempts_are_bounded_by_number_and_deadline():
    assert routing.backoff_s(1, None) == 0.02
    assert routing.backoff_s(2, 10.0) == 0.04
    assert routing.backoff_s(routing.MAX_ATTEMPTS, None) is None
    assert routing.backoff_s(1, 0.01) is None
