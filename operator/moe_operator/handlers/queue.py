"""Runs one reconcile at a time for each deployment: bursts are answered once, failures again with a pause."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

from moe_operator.errors import RetryableError
from moe_operator.settings import Settings

logger = logging.getLogger(__name__)

_PATIENCE_WITH_BUGS = 5.0
"""Nobody can tell whether time heals an error that nobody foresaw."""


class Name(NamedTuple):
    """Which deployment."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


Work = Callable[[Name], Awaitable[float | None]]
"""Reconciles a deployment; says after how many seconds to look again unasked, or None to forget it."""


@dataclass
class _Item:
    changed: asyncio.Event
    task: asyncio.Task[None]


class ReconcileQueue:
    """Deployments that wait for a reconcile. Of one event loop; not for threads."""

    def __init__(self, work: Work, settings: Settings, chance: Callable[[], float] = random.random) -> None:
        """chance: numbers of [0, 1), by which pauses after failures are spread."""
        self._work = work
        self._settings = settings
        self._chance = chance
        self._items: dict[Name, _Item] = {}
        self._slots = asyncio.Semaphore(settings.workers)
        self._slots_for_failing = asyncio.Semaphore(max(1, settings.workers // 4))

    def add(self, name: Name) -> None:
        """Something of this deployment changed."""
        if name not in self._items:
            changed = asyncio.Event()
            self._items[name] = _Item(changed, asyncio.create_task(self._run(name, changed), name=f"{name}"))
        self._items[name].changed.set()

    async def close(self) -> None:
        """Stops: what is under way is cancelled at its next pause."""
        tasks = [item.task for item in self._items.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: Name, changed: asyncio.Event) -> None:
        failures = 0
        pause: float | None = self._settings.resync_seconds
        while pause is not None or changed.is_set():
            await _wait(changed, pause)
            await asyncio.sleep(self._settings.debounce_seconds)
            try:
                pause = await self._turn(name, changed, failing=failures > 0)
                failures = 0
            except RetryableError as error:
                pause = backoff(self._settings, failures, error.patience, self._chance())
                pause = min(pause, error.longest_seconds)
                failures += 1
                logger.warning("%s: %s; trying again in %.1f s", name, error, pause)
            except Exception:
                # A bug of ours in one deployment must not end the service of the others.
                pause = backoff(self._settings, failures, _PATIENCE_WITH_BUGS, self._chance())
                failures += 1
                logger.exception("%s: unexpected error; trying again in %.1f s", name, pause)
        del self._items[name]

    async def _turn(self, name: Name, changed: asyncio.Event, *, failing: bool) -> float | None:
        async with self._slots_for_failing if failing else contextlib.nullcontext(), self._slots:
            # Only now: what changes while this one waits for its turn is seen in this turn.
            changed.clear()
            return await self._work(name)


async def _wait(changed: asyncio.Event, limit_seconds: float | None) -> None:
    try:
        await asyncio.wait_for(changed.wait(), limit_seconds)
    except TimeoutError:
        return


def backoff(settings: Settings, failures: int, patience: float = 1.0, chance: float = 0.0) -> float:
    """Seconds to pause after one more failure in a row, of which `failures` came before.

    patience: the error's. chance: from [0, 1); takes away up to half of the pause, so that many that failed
    together do not come back together.
    """
    # 2**16 s is beyond any limit; a longer row would overflow a float in the end.
    longest = min(settings.retry_first_seconds * 2.0 ** min(failures, 16), settings.retry_most_seconds)
    return longest * patience * (1 - chance / 2)
