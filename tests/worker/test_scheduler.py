"""The scheduler as behaviours and timelines; the simulated device proves what its steps read and write."""

import random

import pytest

from moe_worker.errors import QueueFullError, RequestError
from moe_worker.scheduler.plan import UNKNOWN_TOKEN, Arrival, Limits
from tests.worker.simulated import SimulatedEngine


def engine(**changes):
    choices = {"sequences": 4, "waiting": 100, "pages": 64, "page_size": 4, "prefill_tokens": 32}
    return SimulatedEngine(Limits(**(choices | {"least_tokens": 8, "target_s": 0.05} | changes)))


def prompt(length, seed=0):
    return random.Random(seed).choices(range(3), k=length)


def computed(plan):
    """What a step computes: request -> tokens."""
    return {chunk.id: len(chunk.tokens) for chunk in plan.step.chunks} if plan.step else {}


def begun(plan):
    return [admitted.id for admitted in plan.admitted]


# What a step holds


def test_a_request_is_computed_token_by_token_to_its_end():
    run = engine()
    run.submit(1, prompt(6), 3)
    plans = [run.step() for _ in range(4)]
    assert [computed(plan) for plan in plans] == [{1: 6}, {1: 1}, {1: 1}, {}]
    assert [len(plan.step.chunks[0].pages) for plan in plans[:3]] == [2, 0, 0]
    assert run.ended == {1: "finished"}
    assert run.scheduler.idle


def test_a_long_prompt_is_cut_and_every_stream_gets_a_token_in_every_step():
    run = engine(pages=400)
    for number in (1, 2):
        run.submit(number, prompt(4, number), 60)
    run.step(0.02)
    run.submit(3, prompt(1000, 3), 1)
    while 3 not in run.ended:
        plan = run.step(0.02)
        assert computed(plan)[1] == computed(plan)[2] == 1
        assert 0 < computed(plan)[3] <= 32
    run.drain()
    assert run.scheduler.counters.largest_gap == 1


def test_prompts_have_the_whole_step_where_no_stream_waits():
    run = engine(target_s=0.001, prefill_tokens=32)
    run.submit(1, prompt(64), 2)
    assert [computed(run.step(1.0))[1] for _ in range(2)] == [32, 32]


def test_a_step_with_streams_takes_no_longer_than_aimed_for_once_the_machine_is_known():
    """A machine of 10 ms a step and 0.1 ms a token: 400 tokens fit into 50 ms."""
    run = engine(sequences=8, pages=6000, prefill_tokens=2000, least_tokens=16)
    for number in range(4):
        run.submit(number, prompt(5, number), 150)
    run.submit(9, prompt(20_000, 9), 1)
    took = []
    while 9 not in run.ended:
        tokens = run.plan().step.tokens
        took.append(0.010 + 0.0001 * tokens)
        run.now += took[-1]
        run.complete()
    assert max(took[5:]) == pytest.approx(0.05, rel=0.02)
    assert len(took) < 20_000 / 390 + 10


def test_a_slow_machine_runs_fewer_sequences_at_once():
    """1 ms a token and none for the step itself: the aim of 20 ms leaves room for 20 streams of 64."""
    run = engine(sequences=64, pages=1000, prefill_tokens=64, least_tokens=4, target_s=0.02)
    for number in range(64):
        run.submit(number, prompt(4, number), 30)
    most = 0
    while run.scheduler.waiting:
        plan = run.plan()
        run.now += 0.001 * plan.step.tokens
        run.complete()
        most = max(most, run.scheduler.running)
    assert 16 <= most <= 24
    run.drain()


def test_where_no_step_meets_the_aim_a_flood_runs_no_more_than_the_least_sequences():
    """10 ms a token, 50 ms aimed at: steps of 16 streams take 160 ms, of all 60 they would take 600."""
    run = engine(sequences=128, pages=9000, page_size=16, prefill_tokens=512, least_tokens=16)
    for number in range(60):
        run.submit(number, prompt(64, number), 40)
    streams = []
    while not run.scheduler.idle:
        step = run.plan().step
        run.now += 0.01 * step.tokens
        run.complete()
        streams.append(len(step.chunks))
    assert max(streams) <= 16


def captured(step):
    """Seconds of a step on a GPU (W4A8, 16 billion parameters): without prompts it is a captured one."""
    if step.tokens == len(step.chunks):
        return 0.0012 + 0.00004 * step.tokens
    return 0.025 + 0.000012 * step.tokens


@pytest.mark.parametrize("target_s", [0.05, 0.01])
@pytest.mark.parametrize(("cold_s", "apart"), [(0.0, False), (1.0, False), (1.0, True)])
def test_prompts_are_not_kept_small_where_that_makes_steps_no_shorter(target_s, cold_s, apart):
    """24 requests a second; the first waits for a compilation of cold_s, others come meanwhile or later."""
    run = engine(
        sequences=32, pages=9000, page_size=16, prefill_tokens=1024, least_tokens=16, target_s=target_s
    )
    chance, at, waiting = random.Random(0), 0.0, []
    for number in range(80):
        waiting.append((at, number, prompt(chance.randint(128, 384), number)))
        at += chance.expovariate(24) if number or not apart else 2 * cold_s
    arrived, waits = {number: at for at, number, _ in waiting}, {}
    while waiting or not run.scheduler.idle:
        while waiting and waiting[0][0] <= run.now:
            run.submit(*waiting.pop(0)[1:], 40)
        plan = run.plan()
        run.now = run.now if plan.step or not waiting else max(run.now, waiting[0][0])
        if plan.step:
            run.now += captured(plan.step) + (cold_s if plan.step.number == 1 else 0.0)
            run.complete()
            for chunk in plan.step.chunks:
                if chunk.samples:
                    waits.setdefault(chunk.id, run.now - arrived[chunk.id])
    later = sorted(wait for number, wait in waits.items() if arrived[number] > 2 * cold_s)
    assert later[len(later) * 95 // 100] < 0.15


# Who comes first


def test_equal_requests_start_in_order_of_arrival_as_places_come_free():
    run = engine(sequences=2)
    for number in range(5):
        run.submit(number, prompt(3, number), 2)
        run.now += 0.001
    order = []
    while not run.scheduler.idle:
        order += begun(run.step())
    assert order == [0, 1, 2, 3, 4]


def test_a_higher_priority_starts_first_but_a_lower_one_is_not_starved():
    run = engine(sequences=1, aging_s=10.0)
    run.submit(0, prompt(3), 100, priority=0)
    run.step()
    run.submit(1, prompt(3), 1, priority=0)
    run.now += 5
    run.submit(2, prompt(3), 1, priority=1)  # 5 s later, but a level is worth 10 s
    run.now += 6
    run.submit(3, prompt(3), 1, priority=1)  # 11 s later: the first has waited long enough
    run.cancel(0)
    order = []
    while not run.scheduler.idle:
        order += begun(run.step())
    assert order == [2, 1, 3]


def test_an_important_prompt_goes_ahead_of_one_that_is_being_computed():
    run = engine(pages=200)
    run.submit(1, prompt(400), 1)
    run.step()
    run.submit(2, prompt(20, 2), 1, priority=5)
    assert computed(run.step()) == {2: 20, 1: 12}


def test_nobody_passes_a_large_request_that_waits_for_pages():
    run = engine(pages=16)  # 64 tokens
    run.submit(1, prompt(30, 1), 10)
    run.step()
    run.submit(2, prompt(50, 2), 1)
    run.submit(3, prompt(4, 3), 1)
    order = []
    while not run.scheduler.idle:
        order += begun(run.step())
    assert order == [2, 3]


def test_a_request_whose_deadline_has_passed_is_dropped_while_it_waits_and_while_it_runs():
    run = engine(sequences=1)
    run.submit(1, prompt(9), 50, deadline=0.5)
    run.submit(2, prompt(9), 50, deadline=0.2)
    run.submit(3, prompt(9), 1)
    seen = {}
    while not run.scheduler.idle:
        now = run.now
        for number in run.step(0.1).expired:
            seen[number] = round(now, 3)
    assert seen == {2: 0.2, 1: 0.5}
    assert run.ended == {2: "expired", 1: "expired", 3: "finished"}
    assert run.scheduler.counters.expired == 2


# What is refused


def test_a_full_queue_says_when_a_place_will_be_free_from_the_measured_rate():
    run = engine(sequences=2, waiting=2)
    for number in range(4):
        run.submit(number, prompt(3), 1)
    with pytest.raises(QueueFullError, match="full") as error:
        run.submit(99, prompt(3), 1)
    assert error.value.retry_after_s == 1.0
    for number in range(4, 400):  # from now on one request ends every 0.25 s
        run.cancel(number - 4)
        run.now += 0.25
        run.submit(number, prompt(3), 1)
    with pytest.raises(QueueFullError) as error:
        run.submit(999, prompt(3), 1)
    assert error.value.retry_after_s == pytest.approx(0.25, rel=0.1)


def test_what_can_never_fit_is_refused_and_what_just_fits_ends():
    run = engine(pages=8)
    with pytest.raises(RequestError, match=r"20 prompt tokens and 14 new ones .* holds 32 tokens"):
        run.submit(1, prompt(20), 14)
    run.submit(2, prompt(20), 13)
    run.submit(3, prompt(32, 3), 1)
    run.drain()
    assert run.ended == {2: "finished", 3: "finished"}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("prompt", {"prompt": []}),
        ("max_tokens", {"new_tokens": 0}),
        ("priority", {"priority": 10}),
        ("priority", {"priority": -1}),
    ],
)
def test_impossible_requests_are_refused_with_the_field(field, wrong):
    with pytest.raises(RequestError) as error:
        engine().submit(**({"number": 1, "prompt": [1], "new_tokens": 1} | wrong))
    assert error.value.field == field


def test_an_id_may_be_used_again_only_after_its_end():
    run = engine()
    run.submit(1, prompt(3), 5)
    with pytest.raises(ValueError, match="live already"):
        run.submit(1, prompt(3), 5)
    run.scheduler.release(1)
    run.submit(1, prompt(3), 5)


# Shared prefixes


def test_a_repeated_prompt_is_read_from_the_cache_except_for_its_last_page():
    run = engine()
    run.submit(1, prompt(20), 1)
    run.drain()
    run.submit(2, prompt(20), 1)
    plan = run.step()
    assert computed(plan) == {2: 4}
    assert plan.admitted == ((2, 16),)
    assert run.scheduler.counters.prompt_tokens == 40
    assert run.scheduler.counters.prefix_hit_tokens == 16


def test_a_page_is_shared_as_soon_as_it_is_full_while_its_request_runs_on():
    run = engine(prefill_tokens=8)
    run.submit(1, prompt(40), 4)
    run.step()
    run.submit(2, prompt(40), 4, priority=1)
    assert run.step().admitted == ((2, 8),)
    run.drain()


def test_what_a_request_said_is_cached_for_the_next_turn():
    run = engine()
    run.submit(1, prompt(10), 20)
    run.drain()
    run.submit(2, [*prompt(10), *run.outputs[1], 0, 1], 1)
    assert run.step().admitted == ((2, 28),)  # the last of the 30 tokens was never computed


def test_pages_that_two_requests_fill_with_the_same_text_become_one():
    run = engine(prefill_tokens=64)
    for number in (1, 2):
        run.submit(number, prompt(16), 10)
    assert computed(run.step()) == {1: 16, 2: 16}
    assert run.scheduler.used_pages == 4
    run.drain()


def test_tenants_do_not_share_pages():
    run = engine()
    run.submit(1, prompt(20), 1, namespace="a")
    run.drain()
    run.submit(2, prompt(20), 1, namespace="b")
    assert run.step().admitted == ((2, 0),)


def test_without_a_prefix_cache_nothing_is_shared_or_kept():
    run = engine(prefix_cache=False)
    run.submit(1, prompt(20), 1)
    run.drain()
    run.submit(2, prompt(20), 1)
    assert run.step().admitted == ((2, 0),)
    run.drain()
    assert run.scheduler.free_pages == 64


# When pages run out


def test_idle_prefixes_are_evicted_before_anybody_gives_way():
    run = engine(pages=8)
    run.submit(1, prompt(28, 1), 1)
    run.drain()
    assert run.scheduler.cached_pages == 7
    run.submit(2, prompt(20, 2), 8)
    run.drain()
    assert run.scheduler.evictions > 0
    assert run.scheduler.counters.preemptions == 0


def test_a_request_waits_rather_than_begin_where_a_running_one_would_soon_lack_a_page():
    run = engine(pages=9)
    run.submit(1, prompt(8, 1), 4)
    run.step()
    run.submit(2, prompt(28, 2), 1)
    assert (run.scheduler.free_pages, begun(run.step())) == (7, [])
    run.drain()
    assert run.scheduler.counters.preemptions == 0


def test_the_least_important_gives_way_and_goes_on_later_with_the_same_text():
    run = engine(pages=9, prefill_tokens=64)
    run.submit(1, prompt(8, 1), 24, priority=1)
    run.submit(2, prompt(8, 2), 24)
    preempted = []
    while not run.scheduler.idle:
        preempted += run.step().preempted
    assert set(preempted) == {2}
    assert list(run.ended) == [1, 2]  # and `_end` has compared both with the texts computed alone
    counters = run.scheduler.counters
    assert counters.preemptions == len(preempted)
    assert counters.recomputed_tokens > 0
    assert (counters.largest_gap, counters.largest_preempted_gap > 1) == (1, True)


# Ahead of the host


def test_the_next_step_is_planned_before_the_tokens_of_the_last_are_known():
    run = engine()
    run.submit(1, prompt(5), 3)
    plans = [run.plan() for _ in range(4)]
    assert [plan.step and plan.step.chunks[0].tokens for plan in plans] == [
        prompt(5),
        [UNKNOWN_TOKEN],
        [UNKNOWN_TOKEN],
        None,
    ]
    assert [run.complete() for _ in range(3)] == [(), (), (1,)]


def test_a_request_released_in_flight_frees_its_pages_at_once_and_its_token_is_ignored():
    run = engine()
    run.submit(1, prompt(5), 30)
    run.plan()
    run.plan()
    run.cancel(1)
    assert run.scheduler.used_pages == 0
    assert not run.scheduler.idle
    assert [run.complete(), run.complete()] == [(), ()]
    run.scheduler.release(1)
    assert run.scheduler.idle


def test_steps_complete_in_order_with_a_token_for_each_that_samples():
    run = engine()
    run.submit(1, prompt(5), 3)
    first, second = run.plan().step, run.plan().step
    with pytest.raises(ValueError, match="not the oldest"):
        run.scheduler.complete(second, [1], 0.0)
    with pytest.raises(ValueError, match="does not sample 2"):
        run.scheduler.complete(first, [1, 1], 0.0)
    with pytest.raises(ValueError, match="not the newest"):
        run.scheduler.retract(first, shrink=False)


def test_what_a_step_wrote_before_its_request_gave_way_is_not_shared_as_if_it_were_written_again():
    run = engine(pages=20, prefill_tokens=4, least_tokens=4)
    run.submit(1, prompt(8, 1), 40, priority=1)
    run.step()
    run.step()
    run.submit(2, prompt(60, 2), 1)
    run.plan()
    while not run.plan().preempted:
        run.complete()
    run.cancel(1)
    run.submit(3, prompt(40, 3), 1, priority=9)  # takes a page that the second had filled
    run.plan()
    run.cancel(3)
    assert begun(run.plan()) == [2]
    run.complete()  # the step that computed the second while it had its first pages
    run.submit(4, prompt(60, 2)[:52], 1, priority=9)
    run.drain()
    assert run.ended[2] == run.ended[4] == "finished"


def test_the_time_of_a_step_is_not_counted_twice_where_the_next_waits_behind_it():
    run = engine()
    run.submit(1, prompt(4), 40)
    run.plan()
    for _ in range(30):
        run.plan()
        run.now += 0.1
        run.complete()
    assert run.scheduler.budget.time(prompts=False).estimate(1) == pytest.approx(0.1)


# Steps the device refuses


def test_a_step_taken_back_is_planned_again_as_it_was():
    run = engine()
    for number in (1, 2):
        run.submit(number, prompt(6, number), 3)
    first = run.plan_and_fail().step.chunks
    assert run.plan().step.chunks == first
    second = run.plan_and_fail().step.chunks
    assert run.plan().step.chunks == second
    run.drain()


def test_a_token_taken_back_does_not_count_as_one_that_a_stream_waited_for():
    run = engine(prefill_tokens=3)
    run.submit(1, prompt(3, 1), 2)
    run.plan_and_fail()
    run.submit(2, prompt(3, 2), 1, priority=1)
    assert [list(computed(run.step())) for _ in range(2)] == [[2], [1]]
    assert run.scheduler.counters.largest_gap == 1


def test_a_large_step_that_is_undone_after_a_small_one_lets_no_more_streams_run():
    run = SimulatedEngine(Limits(sequences=8, waiting=8, pages=64, page_size=4))
    for number in range(8):
        run.submit(number, [1, 2], 9)
    run.step()
    large = run.scheduler.plan(run.now).step
    for number in range(6):
        run.scheduler.release(number)
    small = run.scheduler.plan(run.now).step
    assert [len(large.chunks), len(small.chunks)] == [8, 2]
    run.scheduler.retract(small, shrink=True)
    run.scheduler.retract(large, shrink=True)
    assert len(run.scheduler.plan(run.now).step.chunks) == 1


def test_prompts_that_were_too_many_tokens_for_the_device_come_in_smaller_pieces():
    run = engine(pages=400, prefill_tokens=64)
    for number in range(4):
        run.submit(number, prompt(60, number), 10)
    step = run.scheduler.plan(0.0).step
    run.scheduler.retract(step, shrink=True)
    sizes = []
    while not run.scheduler.idle:
        sizes += [step.tokens] if (step := run.step().step) else []
    assert (sizes[0], max(sizes)) == (32, 32)
    assert set(run.ended.values()) == {"finished"}


def test_streams_that_were_too_many_for_the_device_become_fewer():
    run = engine(prefill_tokens=64)
    for number in range(4):
        run.submit(number, prompt(4, number), 10)
    run.step()
    step = run.scheduler.plan(run.now).step
    assert [len(chunk.tokens) for chunk in step.chunks] == [1] * 4
    run.scheduler.retract(step, shrink=True)
    plan = run.step()
    assert (plan.preempted, list(computed(plan))) == ((3, 2), [0, 1])
    while not run.scheduler.idle:
        assert len(computed(run.step())) <= 2
    assert set(run.ended.values()) == {"finished"}


@pytest.mark.parametrize("least", [1, 4])
def test_streams_of_a_micro_batch_that_were_too_many_become_half_as_many(least):
    """Also where a micro-batch may not have so few: then all that run are in one step."""
    limits = Limits(
        sequences=8, waiting=8, pages=64, page_size=4, micro_batches=2, least_streams=least, prefill_tokens=64
    )
    run = SimulatedEngine(limits)
    for number in range(8):
        run.submit(number, prompt(4, number), 10)
    run.step()
    step = run.scheduler.plan(run.now).step
    assert len(step.chunks) == 4
    run.scheduler.retract(step, shrink=True)
    run.step()
    assert run.scheduler.running == (4 if least == 1 else 2)
    assert [len(run.step().step.chunks) for _ in range(4)] == [2] * 4
    while not run.scheduler.idle:
        run.step()
    assert set(run.ended.values()) == {"finished"}


def test_two_steps_may_be_taken_back_though_a_request_gave_way_between_them():
    scheduler = engine().scheduler
    for number in (1, 2):
        scheduler.submit(Arrival(number, prompt(4, number), 5, arrived=0.0))
    scheduler.complete(scheduler.plan(0.0).step, [0, 0], 0.0)
    first, second = scheduler.plan(0.0).step, scheduler.plan(0.0).step
    scheduler.retract(second, shrink=True)
    plan = scheduler.plan(0.0)
    assert plan.preempted == (2,)
    scheduler.retract(plan.step, shrink=False)
    scheduler.retract(first, shrink=False)
    sampled = {1: 1, 2: 1}
    while not scheduler.idle:
        step = scheduler.plan(0.0).step
        for chunk in step.chunks:
            sampled[chunk.id] += chunk.samples
        scheduler.complete(step, [0] * sum(chunk.samples for chunk in step.chunks), 0.0)
    assert sampled == {1: 5, 2: 5}
