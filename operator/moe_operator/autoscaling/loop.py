"""Runs autoscaling for every deployment that enables it. Each has its own task, so none delays another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from moe_api.supervision import Backoff
from moe_operator.autoscaling.rounds import Scaled, ScaledFactory
from moe_operator.autoscaling.subject import Subject, subject
from moe_operator.errors import MoEOperatorError
from moe_operator.observed.observation import Observed
from moe_operator.resources.deployment import Deployment, Name

logger = logging.getLogger(__name__)


@dataclass
class _Item:
    """A deployment that scales, and the loop that scales it."""

    subject: Subject
    task: asyncio.Task[None] | None = None
    scaled: Scaled | None = None
    """None until the stored state is read, and while another process is active."""

    def forget(self) -> None:
        """Drops the state: it becomes outdated while another process scales."""
        scaled, self.scaled = self.scaled, None
        if scaled is not None:
            scaled.close()


class Autoscaler:
    """The deployments that scale. Belongs to one event loop; `saw` and `gone` may be called from any thread.

    Args:
        factory: creates the scaling of a deployment.
        acts: whether this process is the active one among several operators.
    """

    def __init__(self, factory: ScaledFactory, acts: Callable[[], Awaitable[bool]]) -> None:
        self._factory = factory
        self._acts = acts
        self._items: dict[Name, _Item] = {}
        self._retiring: dict[Name, asyncio.Task[None]] = {}
        settings = factory.settings
        self._backoff = Backoff(settings.retry_first_seconds, settings.retry_most_seconds)
        self._loop = asyncio.get_running_loop()

    def saw(self, deployment: Deployment, observed: Observed) -> None:
        """Takes a deployment as a reconcile observed it."""
        self._loop.call_soon_threadsafe(self._take, deployment, subject(deployment, observed))

    def gone(self, name: Name) -> None:
        """A deployment was deleted."""
        self._loop.call_soon_threadsafe(self._drop, name)

    async def close(self) -> None:
        """Stops all scaling, and stores its state if this process is still the active one."""
        items, self._items = list(self._items.values()), {}
        tasks = [*(item.task for item in items if item.task), *self._retiring.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            if items and await self._acts():
                await asyncio.gather(*(item.scaled.keep(item.subject) for item in items if item.scaled))
        except MoEOperatorError as error:
            logger.warning("the scaling histories of %d deployments are not stored: %s", len(items), error)

    def _take(self, deployment: Deployment, seen: Subject | None) -> None:
        name = Name(deployment.identity.namespace, deployment.name)
        item = self._items.get(name)
        if seen is None:
            self._drop(name)
            self._retire(name, deployment)
        elif item is not None and item.subject.deployment.identity.uid == deployment.identity.uid:
            self._release(item.subject.addresses - seen.addresses)
            item.subject = seen
        else:
            self._drop(name)
            self._begin(name, _Item(seen))

    def _begin(self, name: Name, item: _Item) -> None:
        self._items[name] = item
        item.task = self._start("scaling", partial(self._run, name, item), name)

    def _drop(self, name: Name) -> None:
        """Forgets a deployment and its gauges."""
        retiring = self._retiring.pop(name, None)
        if retiring is not None:
            retiring.cancel()
        item = self._items.pop(name, None)
        if item is not None and item.task is not None:
            item.task.cancel()
            item.forget()
            self._release(item.subject.addresses)
        self._factory.metrics.forget(*name)

    def _release(self, addresses: frozenset[str]) -> None:
        if addresses:
            self._factory.supervisor.start("release", partial(self._factory.client.release, addresses))

    def _retire(self, name: Name, deployment: Deployment) -> None:
        self._retiring[name] = self._start("retire", partial(self._factory.retire, deployment), name)

    def _start(self, loop: str, work: Callable[[], Awaitable[None]], name: Name) -> asyncio.Task[None]:
        return self._factory.supervisor.start(loop, work, str(name), self._backoff)

    async def _run(self, name: Name, item: _Item) -> None:
        while True:
            await self._round(name, item)
            await self._pause(item)

    async def _round(self, name: Name, item: _Item) -> None:
        """One round of scaling for a deployment, if this process is the active one."""
        if not await self._acts():
            item.forget()
            self._factory.metrics.forget(*name)
            return
        if item.scaled is not None and item.scaled.outdated:
            item.forget()
        item.scaled = item.scaled or await self._factory.load(item.subject)
        await item.scaled.round(item.subject)

    async def _pause(self, item: _Item) -> None:
        if item.scaled is None:
            await asyncio.sleep(self._factory.settings.recheck_seconds)
        else:
            await item.scaled.until_next(item.subject)
