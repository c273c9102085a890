"""The watches of a deployment's objects, which fill the cache and tell the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from moe_api.supervision import Supervisor
from moe_operator.controller.queue import ReconcileQueue
from moe_operator.kube.cache import ObjectCache
from moe_operator.kube.client import Cluster
from moe_operator.kube.watcher import KindWatcher
from moe_operator.render.children import KINDS
from moe_operator.resources import names
from moe_operator.resources.deployment import Name

WATCHED: Final = (*KINDS, "Pod", names.ROUTES_KIND)
"""Kinds of objects that are watched, besides the deployments themselves."""


async def start_watchers(
    cluster: Cluster,
    cache: ObjectCache,
    queue: ReconcileQueue,
    supervisor: Supervisor,
    namespaces: Sequence[str] = (),
) -> list[KindWatcher]:
    """Starts a watcher for each kind of object of deployments; returns when all have listed their objects.

    namespaces: those that are watched; empty for all.

    kopf watches the deployments themselves. There can be tens of thousands of pods and other objects, and
    kopf would keep a task and a record for each. The function does not wait for a kind that the operator may
    not read: reconciles report the missing right, and continue when it is granted.
    """
    loop = asyncio.get_running_loop()
    seen_all = False

    def tell(heard: Callable[..., None], *arguments: object) -> None:
        # Until then every deployment waits for its first reconcile, because objects may still be missing
        # here.
        if seen_all:
            _in_loop(loop, heard, *arguments)

    def changed(namespace: str, deployment: str) -> None:
        tell(queue.add, Name(namespace, deployment))

    def readable() -> None:
        tell(queue.add_all)

    def watcher(kind: str, space: str) -> tuple[KindWatcher, asyncio.Event]:
        # No thread waits for it: a thread could not be woken if the operator has to stop before that.
        settled = asyncio.Event()
        source = cluster.collection(kind, names.LABEL_NAME, space)
        settle = partial(_in_loop, loop, settled.set)
        return KindWatcher(source, cache, kind, changed, readable, settle, space), settled

    watchers = [watcher(kind, space) for space in namespaces or ("",) for kind in WATCHED]
    started = [one for one, _ in watchers]
    try:
        for one in started:
            one.start(supervisor)
        for _, settled in watchers:
            await settled.wait()
    except asyncio.CancelledError:
        for one in started:
            one.stop()
        raise
    seen_all = True
    return started


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    """Calls a function in an event loop, unless the loop has ended."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *arguments)
