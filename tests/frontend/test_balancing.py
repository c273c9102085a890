"""Routing policies: pure decisions, and requests over a running frontend."""

import asyncio
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.inference.v1 import inference_pb2
from moe_api.prefixes import BLOCK_BYTES
from moe_frontend.policy.balancing import (
    POLICIES,
    Asked,
    PrefixAffinity,
    Question,
    RandomOfTwo,
    Session,
    Weighted,
    question_of,
)
from moe_frontend.policy.prefixes import PrefixIndex
from moe_frontend.policy.routing import Load, choose
from moe_frontend.transport.loads import Reported, recent_token_s

NAMES = ("a", "b", "c")


def loads(*in_flight):
    return [Load(name, count) for name, count in zip(NAMES, in_flight, strict=False)]


def chosen(policy, question, candidates, now=0.0):
    decision = choose(candidates, frozenset(), now, ranking=Asked(policy, question))
    policy.sent(question, decision.replica, now)
    return decision


def test_a_prompt_goes_where_its_beginning_went():
    policy = PrefixAffinity()
    first = chosen(policy, Question((1, 2, 3)), loads(1, 0, 1))
    again = chosen(policy, Question((1, 2, 3, 4)), loads(1, 1, 1))
    assert (first.replica, again.replica, again.reason) == ("b", "b", "PrefixAffinity")


def test_a_hot_prefix_spreads_when_its_replica_is_busy():
    policy, question = PrefixAffinity(), Question(tuple(range(20)))
    assert chosen(policy, question, loads(0, 0, 0)).replica == "a"
    assert chosen(policy, question, loads(3, 0, 0)).replica == "a"
    assert chosen(policy, question, loads(200, 0, 0)).replica == "b"


def test_prompts_that_wait_count_with_their_missing_blocks():
    policy = PrefixAffinity()
    assert policy.sent(Question((1, 2, 3)), "a", 0.0) == 3
    assert policy.sent(Question((1, 2, 3, 4)), "a", 0.0) == 1
    waits, streams = Load("a", 1, work=20.0), Load("b", 4)
    assert chosen(policy, Question((1, 2, 3, 4, 5)), [Load("a", 1), streams]).replica == "a"
    assert chosen(policy, Question((1, 2, 3, 4, 5)), [waits, streams]).replica == "b"


def with_speed(*states):
    return [Load(name, count, token_s=each) for name, (count, each) in zip(NAMES, states, strict=False)]


def test_unequal_replicas_get_requests_by_their_speed():
    """Filled one by one, a replica that is twice as fast has twice as many."""
    speeds, counts = {"a": 0.01, "b": 0.02, "c": 0.02}, dict.fromkeys(NAMES, 0)
    policy = Weighted()
    for number in range(40):
        there = [Load(name, counts[name], number, token_s=speeds[name]) for name in NAMES]
        decision = chosen(policy, Question(), there)
        counts[decision.replica] += 1
    assert decision.reason == "Weighted"
    assert counts == {"a": 20, "b": 10, "c": 10}


def test_a_replica_of_unknown_speed_is_one_like_the_others():
    assert chosen(Weighted(), Question(), with_speed((2, 0.0), (1, 0.0))).replica == "b"
    assert chosen(Weighted(), Question(), with_speed((0, 0.03), (0, 0.0), (0, 0.01))).replica == "c"
    assert chosen(Weighted(), Question(), with_speed((1, 0.02), (0, 0.0), (1, 0.02))).replica == "b"


def test_one_that_says_that_it_is_fast_does_not_get_everything():
    assert chosen(Weighted(), Question(), with_speed((8, 1e-6), (1, 0.02), (1, 0.02))).replica == "b"


def test_speed_is_that_of_recent_answers():
    reports = [
        Reported(0, 0, 1, 0, *totals) for totals in ((5, 0.05), (7, 0.09), (7, 0.09), (2, 0.5), (4, 0.54))
    ]
    known, found = 0.0, []
    for before, after in itertools.pairwise((None, *reports)):
        known = recent_token_s(known, before, after)
        found.append(known)
    assert found == pytest.approx([0.0, 0.02, 0.02, 0.02, 0.02])
    for wrong in (float("nan"), float("inf"), -1.0, 0.0):
        assert recent_token_s(0.02, reports[0], Reported(0, 0, 1, 0, 9, wrong)) == 0.02


async def test_a_prompt_counts_until_its_first_token(bench):
    """A replica with a long prompt under way gets no requests while another one only writes answers."""
    running = await bench(workers=2, policy=PrefixAffinity())
    silent = running.generate("silent" + " " * 8 * BLOCK_BYTES)
    async with asyncio.timeout(30):
        while not any(worker.requests for worker in running.workers):
            await asyncio.sleep(0.005)
    busy, other = sorted(running.workers, key=lambda worker: -worker.requests)
    streams = [running.generate("hold") for _ in range(3)]
    for stream in streams:
        await stream.read()
    assert (busy.requests, other.requests) == (1, 3)
    silent.cancel()
    await busy.until(lambda worker: not worker.running)
    await running.text("count 1 0")
    assert (busy.requests, other.requests) == (2, 3)


def test_a_replica_that_comes_back_is_not_taken_to_hold_anything():
    policy = PrefixAffinity()
    chosen(policy, Question((1, 2)), loads(0, 1, 1))
    policy.keep(frozenset("bc"))
    assert chosen(policy, Question((1, 2)), loads(1, 0, 0)).replica == "b"


def test_what_was_sent_long_ago_counts_no_more():
    policy = PrefixAffinity(PrefixIndex(ttl_s=10))
    chosen(policy, Question((1, 2, 3)), loads(0, 1, 1))
    assert chosen(policy, Question((1, 2, 3)), loads(1, 0, 0), now=9.0).replica == "a"
    assert chosen(policy, Question((1, 2, 3)), loads(1, 0, 0), now=20.0).replica == "b"


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.lists(st.integers(0, 99), max_size=30)), max_size=50))
def test_the_index_is_bounded_and_never_claims_what_was_not_sent(sent):
    index, prefixes = PrefixIndex(most=40), {}
    for now, (replica, blocks) in enumerate(sent):
        index.note(replica, blocks, float(now))
        for end in range(1, len(blocks) + 1):
            prefixes.setdefault(replica, set()).update(blocks[:end])
        assert len(index) <= 40
    for _, blocks in sent:
        for replica, count in index.held(blocks, float(len(sent))).items():
            assert set(blocks[:count]) <= prefixes[replica]


def test_a_session_stays_where_it_is_while_its_replica_is_there():
    sessions = [Question(session=f"s{number}") for number in range(200)]
    before = [chosen(Session(), question, loads(9, 0, 0)).replica for question in sessions]
    assert {before.count(name) > 30 for name in NAMES} == {True}
    after = [chosen(Session(), question, loads(0, 9)).replica for question in sessions]
    assert all(old == new for old, new in zip(before, after, strict=True) if old != "c")
    assert chosen(Session(), Question(), loads(2, 1, 3)).replica == "b"


def test_the_less_loaded_of_two_is_never_the_most_loaded_of_three():
    policy = RandomOfTwo(random.Random(1))
    picked = {chosen(policy, Question(), loads(0, 1, 2)).replica for _ in range(100)}
    assert picked == {"a", "b"}


@pytest.mark.parametrize("name", POLICIES)
def test_a_replica_that_just_failed_comes_last(name):
    failed = [Load("a", 0, failures=1, failed_at=0.0), Load("b", 50)]
    assert chosen(POLICIES[name](), Question((1,), "s"), failed, now=0.1).replica == "b"


def test_a_question_holds_session_and_blocks_by_tenant():
    request = inference_pb2.GenerateRequest(prompt="x" * 1024)
    one = question_of(request, [("x-session-id", "s"), ("authorization", "a")])
    other = question_of(request, [("authorization", "b")])
    assert one.session == "s"
    assert not set(one.blocks) & set(other.blocks)


async def test_a_frontend_sends_equal_beginnings_to_one_replica(bench):
    running = await bench(workers=3, policy=PrefixAffinity())
    prompt = "count 1 0" + " " * 4096
    for _ in range(6):
        await running.text(prompt)
    assert sorted(worker.requests for worker in running.workers) == [0, 0, 6]
