"""The life of a rank that follows: answer probes, load, compute what the leader says, end with it."""

import asyncio
import logging

from moe_api import transport
from moe_api.health import Health
from moe_api.server import create_server
from moe_api.supervision import Supervisor
from moe_worker.config.directory import find_checkpoint
from moe_worker.errors import EngineDiedError, SettingsError
from moe_worker.service.engine_client import EngineClient
from moe_worker.service.server import CLOSE_GRACE_S, ServeSettings, stop_on_signal, unless_stopped
from moe_worker.service.wire import Start

LARGEST_REQUEST, MOST_STREAMS = 1 << 16, 16
log = logging.getLogger(__name__)


def follow(settings: ServeSettings, listen: str | None) -> None:
    """Follows until the leader is gone. Raises WorkerError, also then: a rank alone is of no use.

    listen: HOST:PORT where probes are answered; None: nowhere. After SIGTERM, the rank computes on until its
    leader has drained and left, for `settings.grace_s` at most.
    """
    asyncio.run(_follow(settings, listen))


async def _follow(settings: ServeSettings, listen: str | None) -> None:
    directory = await asyncio.to_thread(find_checkpoint, settings.model)
    stop, health, supervisor = stop_on_signal(settings.grace_s), Health(()), Supervisor()
    server = create_server(transport.server_options(LARGEST_REQUEST, MOST_STREAMS))
    await health.register(server)
    if listen is not None:
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise SettingsError(
                f"cannot listen on {listen}; give a free HOST:PORT of this machine"
            ) from error
        log.info("listening on port %d, joining mesh %s", port, settings.options.mesh)
    await server.start()
    try:
        engine = await EngineClient.start(Start(str(directory), settings.options), settings.stall_timeout_s)
        try:
            if await unless_stopped(engine.loaded(), stop.drain):
                await health.set_ready(ready=True)
                log.info("rank %d of mesh %s computes", settings.options.mesh_rank, settings.options.mesh)
                await unless_stopped(_run(engine, supervisor, stop.drain), stop.now)
        finally:
            await engine.stop()
    finally:
        await supervisor.close()
        await health.close()
        await server.stop(CLOSE_GRACE_S)


async def _run(engine: EngineClient, supervisor: Supervisor, terminating: asyncio.Event) -> None:
    """Returns when the leader has left a terminating rank. Raises EngineDiedError when it leaves another
    one.
    """
    error: EngineDiedError = await engine.run(supervisor)
    if not terminating.is_set():
        raise error
    log.info("the leader has left: %s", error)
