"""The queue of deployments: one reconcile at a time for each, none forgotten."""

from __future__ import annotations

import asyncio

import pytest

from moe_api.supervision import Supervisor
from moe_operator.controller.queue import ReconcileQueue
from moe_operator.errors import ClusterUnavailableError
from moe_operator.resources.deployment import Name
from moe_operator.settings import Settings

QUICK = Settings(debounce_seconds=0.01, retry_first_seconds=0.01, resync_seconds=3600)
DOCS = Name("default", "docs")


class Work:
    """Plays the reconciler: writes down what runs, and answers what it is told to."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = asyncio.Queue()
        self.running = 0
        self.most_running = 0
        self.hold = None

    async def __call__(self, name):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.calls.put_nowait(name)
        if self.hold is not None:
            await self.hold.wait()
        self.running -= 1
        answer = self.answers.pop(0) if self.answers else 3600.0
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def next(self):
        return await asyncio.wait_for(self.calls.get(), 60)


@pytest.fixture
async def start():
    queues = []

    def build(work):
        queues.append(ReconcileQueue(work, QUICK, Supervisor()))
        return queues[-1]

    yield build
    for queue in queues:
        await queue.close()


async def test_a_burst_of_changes_is_one_reconcile(start):
    work = Work()
    queue = start(work)
    for _ in range(50):
        queue.add(DOCS)
    queue.add(Name("default", "last"))
    assert {await work.next(), await work.next()} == {DOCS, Name("default", "last")}
    assert work.calls.empty()


async def test_a_change_during_a_reconcile_leads_to_one_more_after_it(start):
    work = Work()
    work.hold = asyncio.Event()
    queue = start(work)
    queue.add(DOCS)
    await work.next()
    for _ in range(5):
        queue.add(DOCS)
    work.hold.set()
    await work.next()
    assert (work.most_running, work.calls.empty()) == (1, True)


async def test_deployments_do_not_wait_for_each_other(start):
    work = Work()
    work.hold = asyncio.Event()
    queue = start(work)
    queue.add(DOCS)
    queue.add(Name("default", "other"))
    assert len({await work.next(), await work.next()}) == 2
    assert work.most_running == 2


@pytest.mark.parametrize("error", [ClusterUnavailableError("down"), RuntimeError("a bug")])
async def test_a_failure_is_tried_again(start, error):
    work = Work(error, error)
    start(work).add(DOCS)
    for _ in range(3):
        assert await work.next() == DOCS


async def test_it_reconciles_again_unasked_after_the_time_it_was_told(start):
    work = Work(0.01)
    start(work).add(DOCS)
    await work.next()
    assert await work.next() == DOCS


async def test_one_that_is_gone_is_forgotten_until_it_is_back(start):
    work = Work(None)
    queue = start(work)
    queue.add(DOCS)
    await work.next()
    queue.add(DOCS)
    assert await work.next() == DOCS
