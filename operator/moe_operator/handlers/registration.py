"""What kopf calls: start, stop, and every change of a deployment or of something that belongs to one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import kopf
from opentelemetry import metrics, trace

from moe_api import telemetry
from moe_operator.errors import InstallationError, MoEOperatorError
from moe_operator.handlers.acting import Acting
from moe_operator.handlers.autoscaler import Autoscaler
from moe_operator.handlers.queue import Name, ReconcileQueue
from moe_operator.handlers.reconcile import Reconciler
from moe_operator.handlers.scaled import ScaledFactory
from moe_operator.handlers.scaling_metrics import ScalingMetrics
from moe_operator.kube import peering
from moe_operator.kube.client import Cluster, connect
from moe_operator.manifests.children import KINDS
from moe_operator.resources import names
from moe_operator.rpc.polling import Poller
from moe_operator.settings import Settings

_WATCHED = {**KINDS, "Pod": "v1"}


def register(registry: kopf.OperatorRegistry, settings: Settings) -> None:
    """Adds the operator's handlers to a registry."""
    kopf.on.startup(registry=registry)(partial(start, own=settings))
    kopf.on.cleanup(registry=registry)(stop)
    kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry, id="deployment")(
        deployment_changed
    )
    for kind, api_version in _WATCHED.items():
        handler = kopf.on.event(api_version, f"{kind.lower()}s", registry=registry, id=kind)
        handler(child_changed)


async def start(*, settings: kopf.OperatorSettings, memo: kopf.Memo, own: Settings, **_: Any) -> None:
    """Connects, checks the installation, and starts the queue that the other handlers fill."""
    configure(settings, own, datetime.now(UTC))
    try:
        cluster = await asyncio.to_thread(connect, own.api_timeout_seconds)
        await asyncio.to_thread(prepare_installation, cluster, own)
    except MoEOperatorError as error:
        # The CRDs may be on their way: one `kubectl apply` brings them and the operator.
        raise kopf.TemporaryError(str(error), delay=own.retry_first_seconds) from error
    memo.telemetry = telemetry.configure("moe-operator")
    memo.threads = ThreadPoolExecutor(own.workers, thread_name_prefix="reconcile")

    async def work(name: Name) -> float | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(memo.threads, reconciler.reconcile, name)

    memo.queue = ReconcileQueue(work, own)
    memo.autoscaler = _autoscaler(cluster, own, settings.peering.priority, memo)
    reconciler = Reconciler(
        cluster, own, settings.peering.priority, lambda: datetime.now(UTC), watcher=memo.autoscaler
    )


def _autoscaler(cluster: Cluster, own: Settings, priority: int, memo: kopf.Memo) -> Autoscaler:
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
    )
    return Autoscaler(factory, Acting(cluster, own, priority, memo.threads))


async def stop(*, memo: kopf.Memo, **_: Any) -> None:
    """Lets the reconciles under way end, and sends the last spans."""
    if "queue" in memo:
        await memo.autoscaler.close()
        await memo.queue.close()
        await asyncio.to_thread(memo.threads.shutdown)
    if "telemetry" in memo:
        await asyncio.to_thread(memo.telemetry.shutdown)


async def deployment_changed(
    *, namespace: str | None, name: str, memo: kopf.Memo, event: Any, meta: Any, **_: Any
) -> None:
    """A deployment was made, changed or deleted. What the operator wrote into its status is no news."""
    seen = memo.get("generation")
    memo.generation = meta.get("generation")
    if event["type"] in (None, "ADDED", "DELETED") or seen != memo.generation:
        memo.queue.add(Name(str(namespace), name))


async def child_changed(
    *, namespace: str | None, labels: Mapping[str, str], memo: kopf.Memo, **_: Any
) -> None:
    """Something that carries a deployment's label was made, changed or deleted."""
    if names.LABEL_NAME in labels:
        memo.queue.add(Name(str(namespace), labels[names.LABEL_NAME]))


def configure(settings: kopf.OperatorSettings, own: Settings, started: datetime) -> None:
    """Settings of kopf itself."""
    settings.peering.name = own.peering
    settings.peering.mandatory = not settings.peering.standalone
    settings.peering.lifetime = int(own.peering_lifetime_seconds)
    settings.peering.priority = settings.peering.priority or peering.priority(started)
    # Events are made from decisions; kopf's own say what its handlers did.
    settings.posting.enabled = False
    # The CRDs are there before the operator starts: watching for more of them would need more rights.
    settings.scanning.disabled = True
    settings.networking.request_timeout = own.api_timeout_seconds
    settings.networking.connect_timeout = own.api_timeout_seconds
    settings.watching.connect_timeout = own.api_timeout_seconds
    settings.watching.server_timeout = 300
    settings.process.ultimate_exiting_timeout = 20.0
    # Both write a line for every event and every probe; what was decided has its own lines.
    for noisy in ("kopf.objects", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for kind, api_version in _WATCHED.items():
        settings.watching.label_selectors[api_version, f"{kind.lower()}s"] = names.LABEL_NAME


def prepare_installation(cluster: Cluster, own: Settings) -> None:
    """Makes the peering object unless it is there.

    Raises InstallationError when a CRD is missing: kopf would wait for it without a word.
    """
    for api_version in (names.API_VERSION, peering.API_VERSION):
        if not cluster.serves(api_version):
            raise InstallationError(
                f"the cluster does not know {api_version}; install the chart, or apply charts/install.yaml"
            )
    cluster.apply(peering.manifest(own.peering))
