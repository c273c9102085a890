"""Runs one reconcile at a time for each deployment: merges bursts, and retries failures after a pause.

Under load, edits go first, because a person waits for their effect. Other reconciles can wait and then cover
more events.
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
"""Unforeseen errors may or may not heal with time."""

_HEAD_START = 10.0
"""Seconds: an edit overtakes other reconciles that have waited for less, so that none waits forever."""


Work = Callable[[Name], Awaitable[float | None]]
"""Reconciles a deployment; returns the seconds until the next resync, or None if it was deleted."""


@dataclass(eq=False)
class _Item:
    """A deployment. changed: it needs a reconcile. edited: the deployment itself changed."""

    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    edited: asyncio.Event = field(default_factory=asyncio.Event)
    since: float = 0.0
    """Start of its wait for a slot, on the loop's clock."""

    @property
    def due(self) -> float:
        """The lowest goes first."""
        return self.since - (_HEAD_START if self.edited.is_set() else 0.0)


class _Slots:
    """A semaphore that admits the earliest due item first, even if the due times change while items wait.

    Args:
        count: items that hold a slot at the same time.
        spare: slots in addition to these, for edited items alone.
    """

    def __init__(self, count: int, spare: int = 0) -> None:
        self._free = count + spare
        self._spare = spare
        self._waiting: dict[asyncio.Future[None], _Item] = {}

    @contextlib.asynccontextmanager
    async def held(self, item: _Item) -> AsyncIterator[None]:
        """Holds a slot for the time of the block."""
        loop = asyncio.get_running_loop()
        slot: asyncio.Future[None] = loop.create_future()
        item.since = loop.time()
        self._waiting[slot] = item
        self.admit()
        try:
            await slot
            yield
        finally:
            if self._waiting.pop(slot, None) is None:
                self._free += 1
                self.admit()

    def admit(self) -> None:
        """Gives free slots to items that wait; call it when one of them was edited."""
        while self._free:
            allowed = [
                slot
                for slot, item in self._waiting.items()
                if not slot.done() and (item.edited.is_set() or self._free > self._spare)
            ]
            if not allowed:
                return
            first = min(allowed, key=lambda slot: self._waiting[slot].due)
            del self._waiting[first]
            self._free -= 1
            first.set_result(None)


class ReconcileQueue:
    """Deployments that wait for a reconcile. Belongs to one event loop; not thread-safe."""

    def __init__(
        self,
        work: Work,
        settings: Settings,
        supervisor: Supervisor,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """chance: numbers of [0, 1), for the jitter of pauses after failures."""
        self._work = work
        self._settings = settings
        self._supervisor = supervisor
        self._chance = chance
        self._items: dict[Name, _Item] = {}
        self._slots = _Slots(settings.workers, settings.workers_for_edits)
        self._slots_for_failing = _Slots(max(1, settings.workers // 4), settings.workers_for_edits)

    def add(self, name: Name, *, edited: bool = False) -> None:
        """Records a change of this deployment's objects, or (`edited`) of the deployment itself by others."""
        item = self._items.get(name)
        if item is None:
            item = self._items[name] = _Item()
            item.task = self._supervisor.start("reconcile", partial(self._run, name, item), str(name))
        item.changed.set()
        if edited:
            item.edited.set()
            for slots in (self._slots_for_failing, self._slots):
                slots.admit()

    def add_all(self) -> None:
        """Records a change that concerns every deployment."""
        for item in self._items.values():
            item.changed.set()

    async def close(self) -> None:
        """Stops: running reconciles are cancelled at their next await."""
        tasks = [item.task for item in self._items.values() if item.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: Name, item: _Item) -> None:
        failures = 0
        item.changed.set()  # the error that ended an earlier run may have ended a reconcile
        pause: float | None = self._settings.resync_seconds
        while pause is not None or item.changed.is_set():
            await _wait(item.changed, pause)
            await _wait(item.edited, self._settings.debounce_seconds)
            try:
                pause = await self._reconcile(name, item, failing=failures > 0)
                failures = 0
            except RetryableError as error:
                pause = backoff(self._settings, failures, error.patience, self._chance())
                pause = min(pause, error.longest_seconds)
                failures += 1
                logger.warning("%s: %s; retrying in %.1f s", name, error, pause)
            except Exception:
                # A bug that one deployment triggers must not stop the others.
                pause = backoff(self._settings, failures, _PATIENCE_WITH_BUGS, self._chance())
                failures += 1
                logger.exception("%s: unexpected error; retrying in %.1f s", name, pause)
        del self._items[name]

    async def _reconcile(self, name: Name, item: _Item, *, failing: bool) -> float | None:
        async with (
            self._slots_for_failing.held(item) if failing else contextlib.nullcontext(),
            self._slots.held(item),
        ):
            # Only now, so that this reconcile covers changes during its wait for a slot.
            item.changed.clear()
            item.edited.clear()
            return await self._work(name)


async def _wait(changed: asyncio.Event, limit_seconds: float | None) -> None:
    try:
        await asyncio.wait_for(changed.wait(), limit_seconds)
    except TimeoutError:
        return


def backoff(settings: Settings, failures: int, patience: float = 1.0, chance: float = 0.0) -> float:
    """Seconds to pause after a failure that follows `failures` consecutive ones.

    patience: the error's. chance: from [0, 1); shortens the pause by up to half, so that deployments that
    failed together do not retry together.
    """
    pauses = Backoff(settings.retry_first_seconds, settings.retry_most_seconds)
    return pauses.pause_s(failures + 1, chance) * patience
