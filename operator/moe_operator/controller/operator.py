"""The operator's process: the objects that run in it, and the handling of each event of a deployment."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

from opentelemetry import metrics, trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader

from moe_api import telemetry
from moe_api.listwatch import UnavailableError
from moe_api.metrics_server import MetricsServer
from moe_api.supervision import Supervisor
from moe_operator.autoscaling.loop import Autoscaler
from moe_operator.autoscaling.metrics import ScalingMetrics
from moe_operator.autoscaling.polling import Poller
from moe_operator.autoscaling.rounds import ScaledFactory
from moe_operator.controller.deployment_metrics import DeploymentMetrics
from moe_operator.controller.edits import Edits
from moe_operator.controller.queue import ReconcileQueue
from moe_operator.controller.reconcile import Reconciler
from moe_operator.controller.watches import start_watchers
from moe_operator.controller.work_metrics import WorkMetrics
from moe_operator.errors import MoEOperatorError
from moe_operator.executor.certificates import Certificates
from moe_operator.kube import peering
from moe_operator.kube.cache import ObjectCache
from moe_operator.kube.client import Cluster
from moe_operator.kube.watcher import KindWatcher
from moe_operator.resources import names
from moe_operator.resources.deployment import Name
from moe_operator.rpc.dialing import Dialer
from moe_operator.rpc.pods import PodClient
from moe_operator.settings import Settings
from moe_operator.statuspage.collecting import Collector
from moe_operator.statuspage.server import StatusServer

P = ParamSpec("P")
T = TypeVar("T")
_SCALING_THREADS = 4
"""For requests of scaling to the API server."""
_ALLOCATIONS = 10_000
"""Net allocations of containers before a collection of the youngest generation; Python's default is 700."""


class Operator:
    """What runs in the process. Of one event loop; `watch` starts the work, `close` ends it.

    Args:
        cluster: the API server.
        cache: of observed objects, filled by the watches.
        own: settings of the operator.
        priority: of this process among several operators.
        server: serves metrics; None if nobody fetches them.
        page: serves the status page; None if nobody looks at it.
    """

    def __init__(
        self,
        cluster: Cluster,
        cache: ObjectCache,
        own: Settings,
        priority: int,
        server: MetricsServer | None,
        page: StatusServer | None = None,
    ) -> None:
        self._cluster, self._cache, self._settings = cluster, cache, own
        self._telemetry = telemetry.configure(
            "moe-operator", readers=[PrometheusMetricReader()] if server else []
        )
        self._supervisor = Supervisor(expected=(MoEOperatorError, UnavailableError))
        if server is not None:
            server.start(self._supervisor)
        threads = own.workers + own.workers_for_edits
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="reconcile")
        # Reconciles must not wait until histories and decisions of scaling are written.
        self._scaling_threads = ThreadPoolExecutor(_SCALING_THREADS, thread_name_prefix="scaling")
        self._queue = ReconcileQueue(self._reconcile, own, self._supervisor)
        self._watchers: list[KindWatcher] = []
        self._edits = Edits()
        certificates = Certificates(cluster)
        dialer = Dialer(certificates.identity)
        self._pods = PodClient(own.rpc_timeout_seconds, dialer)
        self._page = page
        if page is not None:
            page.start(
                self._supervisor, Collector(cluster, cache, own.namespaces, in_loop(self._pods.loads)).read
            )
        rank = peering.Rank(cluster, own.peering, priority, next(iter(own.namespaces), ""))
        self._autoscaler = self._new_autoscaler(rank)
        self._reconciler = Reconciler(
            cluster,
            own,
            rank,
            lambda: datetime.now(UTC),
            in_loop(self._pods.active),
            watcher=self._autoscaler,
            metrics=WorkMetrics(metrics.get_meter("moe_operator")),
            states=DeploymentMetrics(metrics.get_meter("moe_operator")),
            certificates=certificates,
            dialer=dialer,
        )

    async def watch(self) -> None:
        """Starts the watches; returns when every existing object has been observed once."""
        self._watchers = await start_watchers(
            self._cluster, self._cache, self._queue, self._supervisor, self._settings.namespaces
        )
        spare_the_collector()

    async def close(self) -> None:
        """Waits for running reconciles, and exports the last spans; an error of one step skips no other."""
        for watcher in self._watchers:
            watcher.stop()
        async with contextlib.AsyncExitStack() as last_to_first:
            last_to_first.push_async_callback(asyncio.to_thread, self._telemetry.shutdown)
            last_to_first.push_async_callback(self._pods.close)
            last_to_first.push_async_callback(asyncio.to_thread, self._threads.shutdown)
            last_to_first.push_async_callback(asyncio.to_thread, self._scaling_threads.shutdown)
            last_to_first.push_async_callback(self._supervisor.close)
            last_to_first.push_async_callback(self._queue.close)
            last_to_first.push_async_callback(self._autoscaler.close)
            if self._page is not None:
                last_to_first.push_async_callback(asyncio.to_thread, self._page.stop)

    def deployment_changed(self, kind: str | None, body: Mapping[str, Any]) -> None:
        """A deployment was created, changed or deleted.

        kind: of the event, as a watch names it; None for an object of a list.
        """
        metadata = body["metadata"]
        name = Name(metadata["namespace"], metadata["name"])
        if kind == "DELETED":
            self._cache.drop(names.KIND, *name, metadata["uid"])
        else:
            self._cache.put(names.KIND, dict(body))
        if self._edits.take(kind, body):
            self._queue.add(name, edited=True)

    def background(self) -> dict[str, dict[str, int]]:
        """How many background loops of each kind run or wait for their restart."""
        counts: dict[str, Counter[str]] = {}
        for state in self._supervisor.states:
            counts.setdefault(state.loop, Counter())["restarting" if state.paused else "running"] += 1
        return {loop: dict(count) for loop, count in counts.items()}

    async def _reconcile(self, name: Name) -> float | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._reconciler.reconcile, name)

    def _new_autoscaler(self, rank: peering.Rank) -> Autoscaler:
        """The autoscaler, with the threads and connections that it needs."""
        own = self._settings
        factory = ScaledFactory(
            self._cluster,
            self._pods,
            Poller(self._pods, own.scaling_speed),
            own,
            threads=self._scaling_threads,
            laboratory=ThreadPoolExecutor(1, thread_name_prefix="forecast"),
            decided=self._queue.add,
            metrics=ScalingMetrics(metrics.get_meter("moe_operator.autoscaler")),
            tracer=trace.get_tracer("moe_operator.autoscaler"),
            supervisor=self._supervisor,
        )

        async def acts() -> bool:
            return not await factory.call(rank.outranked, datetime.now(UTC))

        return Autoscaler(factory, acts)


def in_loop(work: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """A function for other threads, which runs `work` in the current event loop and waits for its result."""
    loop = asyncio.get_running_loop()

    def call(*arguments: P.args, **options: P.kwargs) -> T:
        return asyncio.run_coroutine_threadsafe(work(*arguments, **options), loop).result()

    return call


def spare_the_collector() -> None:
    """Excludes permanent objects, mostly modules, from garbage collection.

    Also makes it run less often: an object read from the cache counts as hundreds of new ones.
    With 300 deployments a full collection stopped all threads for 0.3 s, 24 times a minute under load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS)
