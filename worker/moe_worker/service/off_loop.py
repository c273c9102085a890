"""Runs work that takes long for long inputs in a few threads outside the event loop."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final, TypeVar

from moe_worker.errors import QueueFullError

# Two threads leave the other cores to the engine; tokenizing releases the interpreter's lock.
THREADS: Final = 2
# Each waiting text is held in memory.
MOST_WAITING: Final = 64
RETRY_AFTER_S: Final = 1.0
T = TypeVar("T")


class OffLoop:
    """Runs functions in THREADS threads (of `pool`, if given); MOST_WAITING may wait for one."""

    def __init__(self, pool: Executor | None = None) -> None:
        self._pool = pool or ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._places = threading.BoundedSemaphore(THREADS + MOST_WAITING)

    async def run(self, work: Callable[[], T]) -> T:
        """Returns or raises what `work` does. Raises QueueFullError if too many wait already."""
        if not self._places.acquire(blocking=False):
            raise QueueFullError(f"{MOST_WAITING} long texts wait to be tokenized", RETRY_AFTER_S)
        try:
            done = self._pool.submit(work)
        except BaseException:
            self._places.release()
            raise
        # Called when the work ends, because the work continues in memory if its caller is cancelled.
        done.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(done)
