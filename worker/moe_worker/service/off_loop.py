"""Work that takes long for long inputs, in a few threads beside the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from moe_worker.errors import QueueFullError

# Two long texts at once leave the other cores to the engine; tokenizing releases the interpreter's lock.
THREADS: Final = 2
# Each waiting text is held in memory.
MOST_WAITING: Final = 64
RETRY_AFTER_S: Final = 1.0
T = TypeVar("T")


class OffLoop:
    """Runs functions in THREADS threads; MOST_WAITING may wait for one."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._under_way = 0

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises QueueFullError where too many wait already."""
        if self._under_way >= THREADS + MOST_WAITING:
            raise QueueFullError(f"{MOST_WAITING} long texts wait to be tokenized", RETRY_AFTER_S)
        self._under_way += 1
        done = self._pool.submit(work)
        done.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end))
        loop = asyncio.get_running_loop()
        return await asyncio.wrap_future(done)

    def _end(self) -> None:
        self._under_way -= 1
