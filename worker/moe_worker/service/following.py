"""The life of a rank that follows: answer probes, load, compute what the leader says, end with it."""

import asyncio
import logging

from opentelemetry import metrics

from moe_api import telemetry, transport
from moe_api.health import Health
from moe_api.metrics_server import MetricsServer
from moe_api.server import create_server
from moe_api.supervision import Supervisor
from moe_worker.config.directory import find_checkpoint
from moe_worker.errors import EngineDiedError
from moe_worker.service.engine_client import EngineClient
from moe_worker.service.listening import bind
from moe_worker.service.server import (
    CLOSE_GRACE_S,
    ServeSettings,
    metric_readers,
    metrics_server,
    stop_on_signal,
    unless_stopped,
)
from moe_worker.service.wire import Start

LARGEST_REQUEST, MOST_STREAMS = 1 << 16, 16
log = logging.getLogger(__name__)


def follow(settings: ServeSettings, listen: str | None) -> None:
    """Follows until the leader is gone. Raises WorkerError, also then: a rank alone is of no use.

    listen: HOST:PORT where probes are answered, unless `settings.health` is set; None: nowhere. A rank that
    follows serves nothing else, so it needs TLS for its leader only. After SIGTERM, the rank computes on
    until its leader has drained and left, for `settings.grace_s` at most. Its metrics say whether it
    computes; those of requests and steps are the leader's.
    """
    scraped = metrics_server(settings.metrics_port)
    with telemetry.configure("moe-worker", readers=metric_readers(scraped)):
        asyncio.run(_follow(settings, listen, scraped))


async def _follow(settings: ServeSettings, listen: str | None, scraped: MetricsServer | None) -> None:
    directory = await asyncio.to_thread(find_checkpoint, settings.model)
    stop, health, supervisor = stop_on_signal(settings.grace_s), Health(()), Supervisor()
    computes = _measured(settings.options.mesh_rank)
    if scraped is not None:
        scraped.start(supervisor)
    server = create_server(transport.server_options(LARGEST_REQUEST, MOST_STREAMS))
    await health.register(server)
    if address := settings.health or listen:
        port = bind(server, address)
        log.info("listening on port %d, joining mesh %s", port, settings.options.mesh)
    await server.start()
    try:
        engine = await EngineClient.start(Start(str(directory), settings.options), settings.stall_timeout_s)
        try:
            if await unless_stopped(engine.loaded(), stop.drain):
                await health.set_ready(ready=True)
                computes.set()
                log.info("rank %d of mesh %s computes", settings.options.mesh_rank, settings.options.mesh)
                await unless_stopped(_run(engine, supervisor, stop.drain), stop.now)
        finally:
            await engine.stop()
    finally:
        if scraped is not None:
            await asyncio.to_thread(scraped.stop)
        await supervisor.close()
        await health.close()
        await server.stop(CLOSE_GRACE_S)


def _measured(rank: int) -> asyncio.Event:
    """An event that the metrics show: set it when this rank computes."""
    computes = asyncio.Event()
    metrics.get_meter("moe_worker").create_observable_up_down_counter(
        "moe_worker.mesh.computing",
        [lambda _: [metrics.Observation(int(computes.is_set()), {"moe_worker.mesh.rank": rank})]],
        "{worker}",
        "Whether this rank, which follows, has loaded its part and computes.",
    )
    return computes


async def _run(engine: EngineClient, supervisor: Supervisor, terminating: asyncio.Event) -> None:
    """Returns when the leader has left a terminating rank. Raises EngineDiedError when it leaves another
    one.
    """
    error: EngineDiedError = await engine.run(supervisor)
    if not terminating.is_set():
        raise error
    log.info("the leader has left: %s", error)
