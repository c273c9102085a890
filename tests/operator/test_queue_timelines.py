"""What the queue does over minutes and hours, in virtual time: who is tried when, and who waits for whom."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools

import pytest

from moe_api.supervision import Supervisor
from moe_operator.controller.queue import ReconcileQueue
from moe_operator.errors import (
    ApplyForbiddenError,
    ChangedMeanwhileError,
    ClusterUnavailableError,
    OutOfTimeError,
    OwnerUnknownError,
)
from moe_operator.resources.deployment import Name
from moe_operator.settings import Settings
from tests.operator import virtual

SETTINGS = Settings(debounce_seconds=0.25, retry_first_seconds=1, retry_most_seconds=60, workers=8)
DOCS = Name("default", "docs")


def starts(outcomes, until, chance=0.0, edited=False):
    """When one deployment is tried, in s, given how each try ends; the last outcome repeats."""
    times = []

    async def work(_):
        times.append(round(asyncio.get_running_loop().time(), 3))
        outcome = outcomes[min(len(times), len(outcomes)) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def main():
        queue = ReconcileQueue(work, SETTINGS, Supervisor(), lambda: chance)
        queue.add(DOCS, edited=edited)
        await asyncio.sleep(until)
        await queue.close()

    virtual.run(main())
    return times


def gaps(times):
    """Pauses between tries, less the debounce."""
    pairs = itertools.pairwise(times)
    return [round(after - before - SETTINGS.debounce_seconds, 3) for before, after in pairs]


def test_pauses_double_up_to_a_minute_while_the_api_server_is_away():
    assert gaps(starts([ClusterUnavailableError("down")], 300)) == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize(
    ("error", "first"),
    [
        (ChangedMeanwhileError("conflict"), 0.1),
        (OutOfTimeError("the time is over"), 0.1),
        (ClusterUnavailableError("down"), 1.0),
        (ApplyForbiddenError("quota"), 5.0),
        (RuntimeError("a bug"), 5.0),
    ],
)
def test_the_type_of_the_error_sets_the_pace(error, first):
    assert gaps(starts([error], 40))[:2] == [first, 2 * first]


def test_what_passes_by_itself_within_half_a_minute_is_tried_every_two_seconds():
    assert gaps(starts([OwnerUnknownError("a young CRD")], 30)) == [1, *[2] * 12]


def test_a_success_starts_the_row_anew():
    down = ClusterUnavailableError("down")
    assert gaps(starts([down, down, down, 10.0, down, 3600.0], 60)) == [1, 2, 4, 10, 1]


def test_chance_takes_up_to_half_of_a_pause_so_that_a_herd_scatters():
    assert gaps(starts([ClusterUnavailableError("down")], 10, chance=0.5))[:3] == [0.75, 1.5, 3.0]


def test_one_that_is_gone_is_not_reconciled_before_it_is_back():
    calls = []

    async def work(name):
        calls.append(asyncio.get_running_loop().time())

    async def main():
        queue = ReconcileQueue(work, SETTINGS, Supervisor())
        queue.add(DOCS)
        await asyncio.sleep(24 * 3600)
        assert calls == [0.25]
        queue.add(DOCS)
        await asyncio.sleep(24 * 3600)
        await queue.close()

    virtual.run(main())
    assert calls == [0.25, 24 * 3600 + 0.25]


def test_twenty_that_hang_and_fail_hold_up_none_of_two_hundred_that_work():
    """A hanging admission webhook in one namespace: each try takes half a minute and comes to nothing."""
    asked, waits = {}, []

    async def work(name):
        now = asyncio.get_running_loop().time()
        if name.namespace == "broken":
            await asyncio.sleep(30)
            raise ClusterUnavailableError("the webhook does not answer")
        waits.append((asked[name], now - asked[name]))
        await asyncio.sleep(0.05)
        return 300.0

    async def main():
        loop = asyncio.get_running_loop()
        queue = ReconcileQueue(work, SETTINGS, Supervisor())
        for number in range(20):
            queue.add(Name("broken", str(number)))
        for second in range(1200):
            for number in range(10):
                name = Name("fine", str((second * 10 + number) % 200))
                asked[name] = loop.time()
                queue.add(name)
            await asyncio.sleep(1)
        await queue.close()

    virtual.run(main())
    # The first round of the broken ones takes 90 s, when nobody knows yet that they are.
    later = [wait for at, wait in waits if at > 100]
    assert len(later) > 10_000
    assert max(later) < SETTINGS.debounce_seconds + 0.1


def waits_in_a_backlog():
    """5 edits and 5 looks a second for a minute, where 8 can be done; seconds that each waits."""
    edits, looks = [], []
    asked = {}

    async def work(name):
        kind, since = asked.pop(name)
        kind.append(asyncio.get_running_loop().time() - since)
        await asyncio.sleep(1.0)

    async def main():
        loop = asyncio.get_running_loop()
        queue = ReconcileQueue(work, SETTINGS, Supervisor())
        for number in range(60 * 5):
            for kind, edited in ((edits, True), (looks, False)):
                name = Name(f"{edited}", str(number))
                asked[name] = kind, loop.time()
                queue.add(name, edited=edited)
            await asyncio.sleep(0.2)
        await asyncio.sleep(600)
        await queue.close()

    virtual.run(main())
    return edits, looks


def test_edits_go_before_reconciles_that_have_waited_for_less_than_ten_seconds():
    edits, looks = waits_in_a_backlog()
    assert (len(edits), len(looks)) == (300, 300)
    early = edits[: 25 * 5]  # 2 of 10 a second are too many: after 40 s the oldest has waited for 10 s
    assert max(early) <= 1.0
    assert 8 < max(looks) < 40


def test_an_edit_of_one_that_waits_already_moves_it_forward():
    order = []

    async def work(name):
        order.append(name.name)
        await asyncio.sleep(1)

    async def main():
        queue = ReconcileQueue(work, dataclasses.replace(SETTINGS, workers=1), Supervisor())
        for name in ("first", "second", "third"):
            queue.add(Name("default", name))
        await asyncio.sleep(0.5)
        queue.add(Name("default", "third"), edited=True)
        await asyncio.sleep(10)
        await queue.close()

    virtual.run(main())
    assert order == ["first", "third", "second"]


@pytest.mark.parametrize("fails", [False, True])
def test_edits_do_not_wait_for_reconciles_that_hang(fails):
    """Neither those of others, nor of deployments that fail themselves: the edit may be what heals them."""
    hang, waits, healed = 30.0, [], {}

    async def work(name):
        now = asyncio.get_running_loop().time()
        if name.name in healed:
            waits.append(now - healed.pop(name.name))
            return 3600.0
        await asyncio.sleep(hang)
        if fails:
            raise ClusterUnavailableError("the webhook does not answer")
        return 5.0

    async def main():
        loop = asyncio.get_running_loop()
        queue = ReconcileQueue(work, SETTINGS, Supervisor())
        for number in range(20):
            queue.add(Name("broken", str(number)))
        await asyncio.sleep(200)
        for number in range(20, 30):
            healed[str(number)] = loop.time()
            queue.add(Name("default", str(number)), edited=True)
            await asyncio.sleep(1)
        assert max(waits) < 0.1
        for number in range(20):
            healed[str(number)] = loop.time()
            queue.add(Name("broken", str(number)), edited=True)
            await asyncio.sleep(1)
        await asyncio.sleep(100)
        await queue.close()

    virtual.run(main())
    assert len(waits) == 30
    waiting = [wait for wait in waits if wait > 0.1]
    assert len(waiting) <= (2 if fails else 10), "those that hang in their own reconcile alone"
    assert all(wait <= hang for wait in waiting)


def test_an_edit_of_one_that_is_cancelled_in_the_same_moment_frees_no_slot_twice():
    running, most = 0, 0

    async def work(name):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(1)
        finally:
            running -= 1
        return 0.0 if name.name == "loops" else 3600.0

    async def main():
        queue = ReconcileQueue(work, dataclasses.replace(SETTINGS, workers=1), Supervisor())
        for name in ("loops", "a", "b", "c"):
            queue.add(Name("default", name))
        await asyncio.sleep(0.5)
        queue._items[Name("default", "b")].task.cancel()
        queue.add(Name("default", "a"), edited=True)
        await asyncio.sleep(20)
        await queue.close()

    virtual.run(main())
    assert most == 2


def test_an_edit_is_not_delayed_to_gather_more():
    assert starts([None], 1, edited=True) == [0.0]
