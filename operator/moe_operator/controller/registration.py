"""Handlers for kopf: start, stop, and every change of a deployment or of its objects."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import kopf
from opentelemetry import metrics, trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader

from moe_api import telemetry
from moe_api.supervision import Supervisor
from moe_operator.autoscaling.loop import Autoscaler
from moe_operator.autoscaling.metrics import ScalingMetrics
from moe_operator.autoscaling.polling import Poller
from moe_operator.autoscaling.rounds import ScaledFactory
from moe_operator.controller.metrics_server import MetricsServer
from moe_operator.controller.queue import ReconcileQueue
from moe_operator.controller.reconcile import Reconciler
from moe_operator.controller.work_metrics import WorkMetrics
from moe_operator.errors import InstallationError, MoEOperatorError
from moe_operator.kube import peering
from moe_operator.kube.client import Cluster, connect
from moe_operator.kube.follow import Follower
from moe_operator.kube.mirror import Mirror
from moe_operator.render.children import KINDS
from moe_operator.resources import names
from moe_operator.resources.deployment import Name, restarted_at
from moe_operator.settings import Settings

_FOLLOWED = (*KINDS, "Pod", names.ROUTES_KIND)
_ALLOCATIONS = 10_000
"""Net allocations of containers before a collection of the youngest generation; Python's default is 700."""


def register(registry: kopf.OperatorRegistry, settings: Settings) -> None:
    """Adds the operator's handlers to a registry."""
    kopf.on.startup(registry=registry)(partial(start, own=settings))
    kopf.on.cleanup(registry=registry)(stop)
    kopf.on.probe(registry=registry, id="background")(background)
    kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry, id="deployment")(
        deployment_changed
    )


async def start(*, settings: kopf.OperatorSettings, memo: kopf.Memo, own: Settings, **_: Any) -> None:
    """Connects, checks the installation, and starts the queue that the other handlers fill."""
    configure(settings, own, datetime.now(UTC))
    try:
        mirror = Mirror(frozenset({names.KIND, *_FOLLOWED}))
        cluster = await asyncio.to_thread(connect, own.api_timeout_seconds, mirror)
        await asyncio.to_thread(prepare_installation, cluster, own)
        server = MetricsServer(own.metrics_port) if own.metrics_port else None
    except MoEOperatorError as error:
        # The CRDs may be on their way: one `kubectl apply` brings them and the operator.
        raise kopf.TemporaryError(str(error), delay=own.retry_first_seconds) from error
    memo.telemetry = telemetry.configure("moe-operator", readers=[PrometheusMetricReader()] if server else [])
    memo.supervisor = Supervisor(expected=(MoEOperatorError,))
    if server is not None:
        server.start(memo.supervisor)
    memo.threads = ThreadPoolExecutor(own.workers, thread_name_prefix="reconcile")

    async def work(name: Name) -> float | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(memo.threads, reconciler.reconcile, name)

    memo.queue, memo.mirror = ReconcileQueue(work, own, memo.supervisor), mirror
    memo.watchers = await follow(cluster, mirror, memo.queue, memo.supervisor)
    spare_the_collector()
    rank = peering.Rank(cluster, own.peering, settings.peering.priority)
    memo.autoscaler = _autoscaler(cluster, own, rank, memo)
    reconciler = Reconciler(
        cluster,
        own,
        rank,
        lambda: datetime.now(UTC),
        watcher=memo.autoscaler,
        metrics=WorkMetrics(metrics.get_meter("moe_operator")),
    )


async def follow(
    cluster: Cluster, mirror: Mirror, queue: ReconcileQueue, supervisor: Supervisor
) -> list[Follower]:
    """Follows what belongs to deployments; returns when all there is has been seen once.

    kopf follows the deployments themselves. Of pods and other objects there can be tens of thousands, for
    each of which kopf would keep a task at the start and a record ever after. A kind that the operator may
    not read is not waited for: reconciles say what is missing, and go on when the right comes.
    """
    loop = asyncio.get_running_loop()
    seen_all = False

    def tell(heard: Callable[..., None], *arguments: object) -> None:
        # Until then every deployment waits for its first reconcile, because objects may still be missing
        # here.
        if seen_all and not loop.is_closed():
            loop.call_soon_threadsafe(heard, *arguments)

    def changed(namespace: str, deployment: str) -> None:
        tell(queue.add, Name(namespace, deployment))

    def readable() -> None:
        tell(queue.add_all)

    followers = [Follower(cluster, mirror, kind, changed, readable) for kind in _FOLLOWED]
    for follower in followers:
        follower.start(supervisor)
    for follower in followers:
        await asyncio.to_thread(follower.settled.wait)
    seen_all = True
    return followers


def spare_the_collector() -> None:
    """Excludes permanent objects, mostly modules, from garbage collection.

    Also makes it run less often: an object read from the cache counts as hundreds of new ones.
    With 300 deployments a full collection stopped all threads for 0.3 s, 24 times a minute under load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS)


def _autoscaler(cluster: Cluster, own: Settings, rank: peering.Rank, memo: kopf.Memo) -> Autoscaler:
    """The autoscaler, with the threads and connections that it needs."""
    factory = ScaledFactory(
        cluster,
        Poller(own.rpc_timeout_seconds, own.scaling_speed),
        own,
        threads=memo.threads,
        laboratory=ThreadPoolExecutor(1, thread_name_prefix="forecast"),
        decided=memo.queue.add,
        metrics=ScalingMetrics(metrics.get_meter("moe_operator.autoscaler")),
        tracer=trace.get_tracer("moe_operator.autoscaler"),
        supervisor=memo.supervisor,
    )

    async def acts() -> bool:
        return not await factory.call(rank.outranked, datetime.now(UTC))

    return Autoscaler(factory, acts)


async def stop(*, memo: kopf.Memo, **_: Any) -> None:
    """Lets the reconciles under way end, and sends the last spans."""
    for follower in memo.get("watchers", ()):
        follower.stop()
    if "queue" in memo:
        await memo.autoscaler.close()
        await memo.queue.close()
        await memo.supervisor.close()
        await asyncio.to_thread(memo.threads.shutdown)
    if "telemetry" in memo:
        await asyncio.to_thread(memo.telemetry.shutdown)


async def background(*, memo: kopf.Memo, **_: Any) -> dict[str, dict[str, int]]:
    """How many background loops of each kind run or wait for their restart: a part of the health answer."""
    counts: dict[str, Counter[str]] = {}
    for state in memo.supervisor.states:
        counts.setdefault(state.loop, Counter())["restarting" if state.paused else "running"] += 1
    return {loop: dict(count) for loop, count in counts.items()}


async def deployment_changed(
    *, namespace: str | None, name: str, memo: kopf.Memo, event: Any, meta: Any, **_: Any
) -> None:
    """A deployment was created, changed or deleted. The operator's own status writes are ignored."""
    _keep(memo.mirror, event)
    seen = memo.get("asked")
    memo.asked = (meta.get("generation"), restarted_at(event["object"]))
    if event["type"] in (None, "ADDED", "DELETED") or seen != memo.asked:
        memo.queue.add(Name(str(namespace), name), edited=True)


def _keep(mirror: Mirror, event: Mapping[str, Any]) -> None:
    body = dict(event["object"])
    if event["type"] == "DELETED":
        metadata = body["metadata"]
        mirror.drop(names.KIND, metadata["namespace"], metadata["name"], metadata["uid"])
    else:
        mirror.put(names.KIND, body)


def configure(settings: kopf.OperatorSettings, own: Settings, started: datetime) -> None:
    """Settings of kopf itself."""
    settings.peering.name = own.peering
    settings.peering.mandatory = not settings.peering.standalone
    settings.peering.lifetime = int(own.peering_lifetime_seconds)
    settings.peering.priority = settings.peering.priority or peering.priority(started)
    # Events are created from decisions; kopf's own only report its handlers.
    settings.posting.enabled = False
    # The CRDs are there before the operator starts: watching for more of them would need more rights.
    settings.scanning.disabled = True
    settings.networking.request_timeout = own.api_timeout_seconds
    settings.networking.connect_timeout = own.api_timeout_seconds
    # By default kopf pauses up to 21 s before it reconnects to the API server.
    settings.networking.error_backoffs = (1, 1, 2, 3, *[5] * 12)
    settings.watching.connect_timeout = own.api_timeout_seconds
    settings.watching.server_timeout = 300
    settings.watching.chunk_size = 500
    settings.process.ultimate_exiting_timeout = 20.0
    # They write a line for every event and every probe; decisions have lines of their own.
    for noisy in ("kopf.objects", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # They write a line for every attempt; the operator logs the final failure itself.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def prepare_installation(cluster: Cluster, own: Settings) -> None:
    """Creates the peering object if it does not exist.

    Raises InstallationError when a CRD is missing: kopf would wait for it without a word.
    """
    for api_version in (names.API_VERSION, peering.API_VERSION):
        if not cluster.serves(api_version):
            raise InstallationError(
                f"{api_version} is not installed; install the chart, or apply charts/install.yaml"
            )
    cluster.apply(peering.manifest(own.peering))
