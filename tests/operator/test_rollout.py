"""The rollout's policy by itself: whatever happens to pods, it keeps its promises."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_operator.observed import pod_status
from moe_operator.observed.pods import Pod
from moe_operator.observed.routes import published
from moe_operator.planner.gates import Gate, changes, waiting
from moe_operator.planner.moves import Replica, Terms, free_ranks, moves
from moe_operator.resources.rollout_spec import Rollout
from moe_operator.rpc.frontends import routed

REPLICAS = st.lists(
    st.builds(
        Replica,
        data_rank=st.integers(0, 30),
        revision=st.sampled_from(["old", "older", "new"]),
        ready=st.booleans(),
        unplaced=st.booleans(),
        work=st.integers(0, 9),
        lost=st.just(value=False),
        makes_room=st.booleans(),
        faltering=st.booleans(),
    ),
    unique_by=lambda replica: replica.data_rank,
    max_size=8,
)
ROLLOUTS = st.builds(
    Rollout,
    max_surge=st.integers(0, 3),
    max_unavailable=st.none() | st.integers(1, 3),
    partition=st.integers(0, 3),
    paused=st.booleans(),
)
TERMS = st.builds(
    Terms, wanted=st.integers(0, 6), revision=st.just("new"), rollout=ROLLOUTS, stalled=st.booleans()
)


@given(REPLICAS, TERMS)
def test_never_more_than_the_surge_and_never_fewer_than_allowed(replicas, terms):
    found = moves(replicas, terms)
    left = [replica for replica in replicas if replica not in found.remove]
    rolls = any(replica.revision != terms.revision for replica in replicas)
    surge = terms.rollout.max_surge if rolls else 0
    if found.create:
        assert len(left) + found.create <= terms.wanted + surge
    serving = sum(replica.ready for replica in replicas)
    missing = terms.rollout.unavailable(terms.wanted) if rolls and not terms.held else 0
    assert sum(replica.ready for replica in left) >= min(serving, terms.wanted - missing)
    if rolls and not terms.held and len(replicas) <= terms.wanted:
        old = sum(replica.revision != terms.revision for replica in left)
        before = sum(replica.revision != terms.revision for replica in replicas)
        assert old >= min(terms.rollout.partition, terms.wanted, before)


@given(REPLICAS, TERMS)
def test_nobody_that_serves_leaves_for_a_pod_that_would_not_fit_in_its_place(replicas, terms):
    replicas = [replace(replica, makes_room=False) for replica in replicas]
    left = [replica for replica in replicas if replica not in moves(replicas, terms).remove]
    serving = sum(replica.ready for replica in replicas)
    assert sum(replica.ready for replica in left) >= min(serving, terms.wanted)


@given(REPLICAS, TERMS, st.frozensets(st.integers(0, 30), min_size=2, max_size=4))
def test_old_replicas_that_make_room_only_together_leave_together(replicas, terms, ranks):
    """Or none of them does, but for those that leave for another reason."""
    group = frozenset(replica.data_rank for replica in replicas if replica.data_rank in ranks)
    alone = [replace(replica, makes_room=False) for replica in replicas]
    replicas = [
        replace(one, makes_room=True, along=group - {one.data_rank}) if one.data_rank in group else one
        for one in alone
    ]
    anyway = {replica.data_rank for replica in moves(alone, terms).remove}
    gone = {replica.data_rank for replica in moves(replicas, terms).remove} - anyway
    if len(group) > 1:
        assert gone in (set(), set(group) - anyway)
    left = [replica for replica in replicas if replica.data_rank not in gone | anyway]
    serving = sum(replica.ready for replica in replicas)
    missing = 0 if terms.held else terms.rollout.unavailable(terms.wanted)
    assert sum(replica.ready for replica in left) >= min(serving, terms.wanted - missing)


@given(REPLICAS, TERMS)
def test_the_only_replica_that_serves_stays_by_default(replicas, terms):
    rollout = terms.rollout.model_copy(update={"max_unavailable": None, "max_surge": 1})
    terms = replace(terms, wanted=1, rollout=rollout)
    left = [replica for replica in replicas if replica not in moves(replicas, terms).remove]
    assert any(replica.ready for replica in left) == any(replica.ready for replica in replicas)


def test_an_old_replica_that_served_a_moment_ago_is_left_until_a_new_one_is_ready():
    terms = Terms(1, "new", Rollout())
    old, new = Replica(0, "old", ready=False, faltering=True), Replica(1, "new", ready=False)
    assert moves([old, new], terms).remove == ()
    assert moves([replace(old, faltering=False), new], terms).remove == (replace(old, faltering=False),)


@given(REPLICAS, TERMS)
def test_nobody_busier_leaves_while_somebody_idler_of_the_same_kind_stays(replicas, terms):
    replicas = [replace(replica, makes_room=True) for replica in replicas]
    found = moves(replicas, terms)
    for gone in (replica for replica in found.remove if replica.ready):
        alike = [r for r in replicas if r.revision == gone.revision and r not in found.remove]
        alike = (
            alike if len(replicas) - len(found.remove) >= terms.wanted else [r for r in alike if r.makes_room]
        )
        assert all(gone.work <= stays.work for stays in alike if stays.ready)


@settings(deadline=None)
@given(REPLICAS, TERMS, st.data())
def test_it_comes_to_an_end_once_pods_start(replicas, terms, data):
    terms = replace(terms, rollout=terms.rollout.model_copy(update={"paused": False}), stalled=False)
    for _ in range(40):
        found = moves(replicas, terms)
        replicas = [replica for replica in replicas if replica not in found.remove]
        taken = {replica.data_rank for replica in replicas}
        made = [Replica(rank, found.revision, ready=False) for rank in free_ranks(found.create, taken)]
        replicas = [
            replace(r, ready=r.ready or data.draw(st.booleans()), unplaced=False, makes_room=True)
            for r in replicas
        ]
        replicas += made
    for _ in range(40):
        replicas = [replace(replica, ready=True, makes_room=True) for replica in replicas]
        found = moves(replicas, terms)
        replicas = [replica for replica in replicas if replica not in found.remove]
        taken = {replica.data_rank for replica in replicas}
        replicas += [Replica(rank, found.revision, ready=False) for rank in free_ranks(found.create, taken)]
    assert len(replicas) == terms.wanted
    old = sum(replica.revision != terms.revision for replica in replicas)
    assert old <= terms.rollout.partition
    assert (moves(replicas, terms).create, moves(replicas, terms).remove) == (0, ())


@given(st.integers(0, 5), st.frozensets(st.integers(0, 9)))
def test_new_replicas_get_the_lowest_ranks_that_nobody_has(count, taken):
    ranks = free_ranks(count, taken)
    assert len(ranks) == count == len(set(ranks))
    assert not taken & set(ranks)
    assert all(rank in taken or rank in ranks for rank in range(max(ranks, default=0)))


def pod(**fields):
    return Pod("docs-0-0", "10.0.0.1", False, False, "r", 0, None, **{"uid": "u", "gated": True, **fields})


def test_a_gate_opens_when_every_frontend_sends_requests_to_this_very_pod():
    loaded = pod(containers_ready=True)
    assert waiting([loaded]) == [loaded]
    assert changes([loaded], {}) == []
    assert changes([loaded], {"docs-0-0": "10.0.0.9"}) == [], "its predecessor had that address"
    assert changes([loaded], {"docs-0-0": "10.0.0.1"}) == [Gate("docs-0-0", "u", True)]


def test_a_gate_opens_for_either_address_of_a_dual_stack_pod():
    """Its own first address is IPv4; the workers' Service may be of IPv6."""
    status = {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}
    loaded = pod(containers_ready=True, status=pod_status.read({"status": status}))
    (leader,) = published([route("docs-0-0", "[fd00::1]:8000")]).values()
    frontend = Pod("f", "10.0.0.2", True, False, "", 0, None, uid="f")
    found = routed([frontend], [loaded], 5, {"f": leader})
    assert changes([loaded], found) == [Gate("docs-0-0", "u", True)]
    assert changes([loaded], {"docs-0-0": "fd00::9"}) == []


def route(name, address):
    """The FrontendRoutes object of the frontend's pod f."""
    owner = {"kind": "Pod", "name": "f", "uid": "f"}
    return {
        "metadata": {"name": "f", "ownerReferences": [owner]},
        "routes": [{"name": name, "address": address}],
    }


def test_a_gate_closes_when_the_worker_starts_again():
    assert changes([pod(containers_ready=False, routed=True)], {}) == [Gate("docs-0-0", "u", False)]
    assert changes([pod(containers_ready=True, routed=True)], {}) == []
    assert waiting([pod(containers_ready=False)]) == []
    assert waiting([pod(containers_ready=True, gated=False)]) == [], "pods of before have no gate"
