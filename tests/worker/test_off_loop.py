"""Work outside the event loop: however it ends, its place is free again."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from moe_worker.errors import QueueFullError
from moe_worker.service.off_loop import MOST_WAITING, THREADS, OffLoop

PLACES = THREADS + MOST_WAITING


class Preempted(ThreadPoolExecutor):
    """The event loop's thread gets the processor back only after the work is done."""

    def submit(self, *work):
        done = super().submit(*work)
        wait([done])
        return done


class Closed(ThreadPoolExecutor):
    def submit(self, *_):
        raise RuntimeError("no thread can be started")


async def test_work_that_ends_before_anybody_waits_for_it_frees_its_place():
    off_loop = OffLoop(Preempted(1))
    for number in range(PLACES + 1):
        assert await off_loop.run(lambda number=number: number) == number


async def test_work_that_fails_or_cannot_be_submitted_frees_its_place():
    for off_loop, error in ((OffLoop(), ZeroDivisionError), (OffLoop(Closed()), RuntimeError)):
        for _ in range(PLACES + 1):
            with pytest.raises(error):
                await off_loop.run(lambda: 1 / 0)


async def test_cancelled_work_holds_its_place_until_it_ends():
    off_loop, going_on = OffLoop(), threading.Event()
    callers = [asyncio.create_task(off_loop.run(going_on.wait)) for _ in range(PLACES)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="64 long texts wait"):
        await off_loop.run(int)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    for _ in range(MOST_WAITING):  # those that waited never began
        waiting = asyncio.create_task(off_loop.run(going_on.wait))
        await asyncio.sleep(0)
        callers.append(waiting)
    with pytest.raises(QueueFullError):
        await off_loop.run(int)
    going_on.set()
    await asyncio.gather(*callers[PLACES:])
    async with asyncio.timeout(60):
        assert await off_loop.run(int) == 0
