"""The life of a worker: listen, load, serve, drain, end."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path

import grpc
from opentelemetry import metrics, trace

from moe_api import telemetry, transport
from moe_api.health import Health
from moe_api.inference.v1 import inference_pb2_grpc
from moe_api.malformed import MalformedRequestInterceptor
from moe_api.server import create_server
from moe_api.worker.v1 import worker_pb2_grpc
from moe_worker.config.directory import find_checkpoint, read_checkpoint_config
from moe_worker.config.engine import EngineOptions
from moe_worker.errors import EngineDiedError, SettingsError
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.sampling.defaults import sampling_defaults
from moe_worker.service.engine_client import STALL_TIMEOUT_S, EngineClient
from moe_worker.service.metrics import EngineMetrics
from moe_worker.service.servicers import InferenceService, Phase, Served, WorkerService
from moe_worker.service.wire import Start

SERVICES = ("moe_api.inference.v1.InferenceService", "moe_api.worker.v1.WorkerService")
# Calls that are still open when the worker ends (the last answers, errors) get this long.
CLOSE_GRACE_S = 2.0
# How often the engine is asked where tokens went, while metrics are sent and it computes.
EXPERTS_PERIOD_S = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeSettings:
    """model: checkpoint directory; served_name: what clients ask for; listen: HOST:PORT.

    revision: names what is served and how; workers of one revision take up each other's streams.
    stall_timeout_s: an engine that makes no step for so long, with requests to compute, is killed.
    """

    model: Path
    served_name: str
    listen: str
    options: EngineOptions
    revision: str = ""
    stall_timeout_s: float = STALL_TIMEOUT_S


def serve(settings: ServeSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises WorkerError."""
    with telemetry.configure("moe-worker") as handle:
        asyncio.run(_serve(settings, measured=handle.measures))


async def _serve(settings: ServeSettings, *, measured: bool) -> None:
    stop = _stop_on_signal()
    inference = InferenceService(trace.get_tracer("moe_worker"), metrics.get_meter("moe_worker"))
    health = Health(SERVICES)
    server = await _listen(settings.listen, inference, health, stop)
    try:
        await _load_and_run(settings, inference, health, stop, measured=measured)
    finally:
        await health.close()
        await server.stop(CLOSE_GRACE_S)


def _stop_on_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once.

    Not by the default action: the kernel spares a container's first process from that.
    """
    loop, stop, numbers = asyncio.get_running_loop(), asyncio.Event(), (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        stop.set()
        for number in numbers:
            loop.add_signal_handler(number, os._exit, 128 + number)

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    return stop


async def _listen(
    address: str, inference: InferenceService, health: Health, stop: asyncio.Event
) -> grpc.aio.Server:
    """Answers probes from here on, and requests with UNAVAILABLE."""
    server = create_server(interceptors=[MalformedRequestInterceptor()], options=transport.SERVER_OPTIONS)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(inference, stop), server)
    await health.register(server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise SettingsError(f"cannot listen on {address}; give a free HOST:PORT of this machine") from error
    await server.start()
    log.info("listening on port %d, loading the model", port)
    return server


async def _load_and_run(
    settings: ServeSettings,
    inference: InferenceService,
    health: Health,
    stop: asyncio.Event,
    *,
    measured: bool,
) -> None:
    model = find_checkpoint(settings.model)
    config = read_checkpoint_config(model, settings.options.config_override)
    context_length = settings.options.context_for(config.max_position_embeddings)
    tokenizer = await asyncio.to_thread(Tokenizer.load, model, config)
    defaults = sampling_defaults(model, settings.options.generation_config)
    engine = await EngineClient.start(Start(str(model), settings.options))
    engine.stall_timeout_s = settings.stall_timeout_s
    try:
        if not await _unless_stopped(engine.loaded(), stop):
            return
        inference.served = Served(
            settings.served_name, config, context_length, tokenizer, engine, settings.revision, defaults
        )
        inference.phase = Phase.SERVING
        await health.set_ready(ready=True)
        log.info("serving %s (%s)", settings.served_name, engine.format)
        async with _measuring(engine) if measured else contextlib.nullcontext():
            await _run_until_drained(engine, inference, health, stop)
    finally:
        await engine.stop()


@contextlib.asynccontextmanager
async def _measuring(engine: EngineClient) -> AsyncIterator[None]:
    """Feeds the instruments with what the engine reports."""
    measures = EngineMetrics(metrics.get_meter("moe_worker"), engine)
    engine.on_step = measures.step
    following = asyncio.ensure_future(_follow_experts(engine, measures))
    try:
        yield
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _follow_experts(engine: EngineClient, measures: EngineMetrics) -> None:
    """Asks the engine now and then, so that no step waits for it; ends with the engine."""
    steps = 0
    with contextlib.suppress(EngineDiedError):
        while True:
            await asyncio.sleep(EXPERTS_PERIOD_S)
            if engine.statistics.steps != steps:
                steps = engine.statistics.steps
                measures.count_experts(await engine.expert_statistics())


async def _unless_stopped(loading: Coroutine[None, None, None], stop: asyncio.Event) -> bool:
    """Waits for `loading`, or for `stop`: False then, whatever became of `loading`."""
    task, stopped = asyncio.ensure_future(loading), asyncio.ensure_future(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not stop.is_set():
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


async def _run_until_drained(
    engine: EngineClient, inference: InferenceService, health: Health, stop: asyncio.Event
) -> None:
    """Raises EngineDiedError if the engine ends first."""
    running, drained = (
        asyncio.ensure_future(engine.run()),
        asyncio.ensure_future(_drain(engine, inference, health, stop)),
    )
    await asyncio.wait((running, drained), return_when=asyncio.FIRST_COMPLETED)
    if running.done() and not drained.done():
        drained.cancel()
        inference.phase = Phase.DRAINING
        await health.set_ready(ready=False)
        raise running.result()
    running.cancel()


async def _drain(
    engine: EngineClient, inference: InferenceService, health: Health, stop: asyncio.Event
) -> None:
    """Waits for `stop`, refuses new requests from then on, and ends when those under way have ended."""
    await stop.wait()
    inference.phase = Phase.DRAINING
    await health.set_ready(ready=False)
    log.info("draining: %d requests under way", engine.requests)
    await engine.until_idle()
