"""Runs one reconcile at a time for each deployment: bursts are answered once, failures again with a pause.

When there is more to do than can be done at once, edits go first: a person waits for what they bring, and
looks at what became of them can wait and then take in more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from moe_api.supervision import Backoff, Supervisor
from moe_operator.errors import RetryableError
from moe_operator.resources.deployment import Name
from moe_operator.settings import Settings

logger = logging.getLogger(__name__)

_PATIENCE_WITH_BUGS = 5.0
"""Nobody can tell whether time heals an error that nobody foresaw."""

_HEAD_START = 10.0
"""Seconds: an edit overtakes the looks that have waited for less. No look waits for ever."""


Work = Callable[[Name], Awaitable[float | None]]
"""Reconciles a deployment; says after how many seconds to look again unasked, or None once it is gone."""


@dataclass(eq=False)
class _Item:
    """A deployment. changed: there is something to look at. edited: the deployment itself is new."""

    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    edited: asyncio.Event = field(default_factory=asyncio.Event)
    since: float = 0.0
    """Since when it waits for a slot, on the loop's clock."""

    @property
    def due(self) -> float:
        """Whose is lowest goes first."""
        return self.since - (_HEAD_START if self.edited.is_set() else 0.0)


class _Slots:
    """A semaphore that lets in first who is due first, also where that changes while one waits."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: dict[asyncio.Future[None], _Item] = {}

    @contextlib.asynccontextmanager
    async def held(self, item: _Item) -> AsyncIterator[None]:
        """Holds a slot for the time of the block."""
        if self._free:
            self._free -= 1
        else:
            await self._turn(item)
        try:
            yield
        finally:
            self._pass_on()

    async def _turn(self, item: _Item) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        item.since = loop.time()
        self._waiting[turn] = item
        try:
            await turn
        except asyncio.CancelledError:
            if self._waiting.pop(turn, None) is None:
                self._pass_on()  # it was its turn in the same moment
            raise

    def _pass_on(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        turn = min(self._waiting, key=lambda turn: self._waiting[turn].due)
        del self._waiting[turn]
        turn.set_result(None)


class ReconcileQueue:
    """Deployments that wait for a reconcile. Of one event loop; not for threads."""

    def __init__(
        self,
        work: Work,
        settings: Settings,
        supervisor: Supervisor,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """chance: numbers of [0, 1), by which pauses after failures are spread."""
        self._work = work
        self._settings = settings
        self._supervisor = supervisor
        self._chance = chance
        self._items: dict[Name, _Item] = {}
        self._slots = _Slots(settings.workers)
        self._slots_for_failing = asyncio.Semaphore(max(1, settings.workers // 4))

    def add(self, name: Name, *, edited: bool = False) -> None:
        """Something of this deployment changed; `edited`: the deployment itself, by somebody else."""
        item = self._items.get(name)
        if item is None:
            item = self._items[name] = _Item()
            item.task = self._supervisor.start("reconcile", partial(self._run, name, item), str(name))
        item.changed.set()
        if edited:
            item.edited.set()

    def add_all(self) -> None:
        """Something changed that concerns every deployment."""
        for item in self._items.values():
            item.changed.set()

    async def close(self) -> None:
        """Stops: what is under way is cancelled at its next pause."""
        tasks = [item.task for item in self._items.values() if item.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: Name, item: _Item) -> None:
        failures = 0
        item.changed.set()  # whatever ended an earlier run, it may have ended a reconcile
        pause: float | None = self._settings.resync_seconds
        while pause is not None or item.changed.is_set():
            await _wait(item.changed, pause)
            await _wait(item.edited, self._settings.debounce_seconds)
            try:
                pause = await self._turn(name, item, failing=failures > 0)
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

    async def _turn(self, name: Name, item: _Item, *, failing: bool) -> float | None:
        async with self._slots_for_failing if failing else contextlib.nullcontext(), self._slots.held(item):
            # Only now: what changes while this one waits for its turn is seen in this turn.
            item.changed.clear()
            item.edited.clear()
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
    pauses = Backoff(settings.retry_first_seconds, settings.retry_most_seconds)
    return pauses.pause_s(failures + 1, chance) * patience
