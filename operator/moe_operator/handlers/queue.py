"""Runs one reconcile at a time for each deployment: bursts are answered once, failures again with a pause."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

from moe_operator.errors import RetryableError
from moe_operator.settings import Settings

logger = logging.getLogger(__name__)


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

    def __init__(self, work: Work, settings: Settings) -> None:
        self._work = work
        self._settings = settings
        self._items: dict[Name, _Item] = {}

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
            changed.clear()
            try:
                pause = await self._work(name)
                failures = 0
            except RetryableError as error:
                logger.warning("%s: %s; trying again", name, error)
                pause = backoff(self._settings, failures)
                failures += 1
            except Exception:
                # A bug of ours in one deployment must not end the service of the others.
                logger.exception("%s: unexpected error; trying again", name)
                pause = backoff(self._settings, failures)
                failures += 1
        del self._items[name]


async def _wait(changed: asyncio.Event, limit_seconds: float | None) -> None:
    try:
        await asyncio.wait_for(changed.wait(), limit_seconds)
    except TimeoutError:
        return


def backoff(settings: Settings, failures: int) -> float:
    """Seconds to pause after one more failure in a row, of which `failures` came before."""
    # 2**16 s is beyond any limit; a longer row would overflow a float in the end.
    return min(settings.retry_first_seconds * 2.0 ** min(failures, 16), settings.retry_most_seconds)
