"""Runs the scaling of every deployment that asks for it, each in a task of its own: none delays another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

from moe_operator.autoscaler.subject import Subject, subject
from moe_operator.errors import MoEOperatorError
from moe_operator.handlers.queue import Name, backoff
from moe_operator.handlers.scaled import Scaled, ScaledFactory
from moe_operator.manifests.observed import Observed
from moe_operator.resources.deployment import Deployment

logger = logging.getLogger(__name__)


@dataclass
class _Item:
    subject: Subject
    scaled: Scaled | None = None
    """None until what was kept is read, and while another process acts."""
    task: asyncio.Task[None] | None = None


class Autoscaler:
    """The deployments that scale. Of one event loop; `saw` and `gone` may be called from any thread.

    Args:
        factory: makes the scaling of a deployment.
        acts: whether this process is the one that acts, among several operators.
    """

    def __init__(self, factory: ScaledFactory, acts: Callable[[], Awaitable[bool]]) -> None:
        self._factory = factory
        self._acts = acts
        self._items: dict[Name, _Item] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def saw(self, deployment: Deployment, observed: Observed) -> None:
        """A reconcile looked at a deployment."""
        self._loop.call_soon_threadsafe(self._take, deployment, subject(deployment, observed))

    def gone(self, name: Name) -> None:
        """A deployment was deleted."""
        self._loop.call_soon_threadsafe(self._drop, name)

    async def close(self) -> None:
        """Stops all scaling, and keeps what was learned where this process still acts."""
        items, self._items = list(self._items.values()), {}
        tasks = [*(item.task for item in items if item.task), *self._others]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if items and await self._acts():
            await asyncio.gather(*(item.scaled.keep(item.subject) for item in items if item.scaled))
        await self._factory.poller.close()

    def _take(self, deployment: Deployment, seen: Subject | None) -> None:
        name = Name(deployment.identity.namespace, deployment.name)
        item = self._items.get(name)
        if seen is None:
            self._drop(name)
            self._retire(deployment)
        elif item is not None and item.subject.deployment.identity.uid == deployment.identity.uid:
            self._release(item.subject.addresses - seen.addresses)
            item.subject = seen
        else:
            self._drop(name)
            item = self._items[name] = _Item(seen)
            item.task = asyncio.create_task(self._run(name, item), name=f"scale {name}")

    def _drop(self, name: Name) -> None:
        item = self._items.pop(name, None)
        if item is not None and item.task is not None:
            item.task.cancel()
            self._release(item.subject.addresses)

    def _release(self, addresses: frozenset[str]) -> None:
        if addresses:
            self._background(self._factory.poller.release(addresses))

    def _retire(self, deployment: Deployment) -> None:
        async def retire() -> None:
            try:
                await self._factory.retire(deployment)
            except MoEOperatorError as error:
                logger.warning("%s: %s; the next reconcile tries again", deployment.name, error)

        self._background(retire())

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    async def _run(self, name: Name, item: _Item) -> None:
        failures = 0
        while True:
            try:
                await self._round(item)
                failures = 0
            except MoEOperatorError as error:
                logger.warning("scaling of %s: %s; trying again", name, error)
                failures += 1
            except Exception:
                # A bug of ours in one deployment must not end the scaling of the others.
                logger.exception("scaling of %s: unexpected error; trying again", name)
                failures += 1
            await self._pause(item, failures)

    async def _round(self, item: _Item) -> None:
        """One look, and what follows from it. A process that does not act forgets: what it knows gets old."""
        if not await self._acts():
            item.scaled = None
            return
        item.scaled = item.scaled or await self._factory.load(item.subject)
        await item.scaled.round(item.subject)

    async def _pause(self, item: _Item, failures: int) -> None:
        settings = self._factory.settings
        if failures:
            await asyncio.sleep(backoff(settings, failures - 1))
        elif item.scaled is None:
            await asyncio.sleep(settings.recheck_seconds)
        else:
            await item.scaled.until_next(item.subject)
