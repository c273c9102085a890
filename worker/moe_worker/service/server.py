"""The life of a worker: listen, load, serve, drain, end."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from opentelemetry import metrics, trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics.export import MetricReader

from moe_api import telemetry, transport
from moe_api.health import Health
from moe_api.inference.v1 import inference_pb2_grpc
from moe_api.metrics_server import MetricsServer, PortTakenError
from moe_api.server import create_server
from moe_api.supervision import Supervisor
from moe_api.worker.v1 import worker_pb2_grpc
from moe_api.writing import WRITE_TIMEOUT_S
from moe_worker.config.directory import find_checkpoint, read_checkpoint_config
from moe_worker.config.engine import EngineOptions
from moe_worker.config.model import ModelConfig
from moe_worker.errors import EngineDiedError, SettingsError, WorkerError
from moe_worker.garbage import spare_loaded
from moe_worker.models.chat_template import ChatTemplate, chat_template
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.models.tokenizer_guard import load_guarded
from moe_worker.sampling.defaults import sampling_defaults
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.engine_client import EngineClient
from moe_worker.service.listening import bind, credentials, probes
from moe_worker.service.metrics import EngineMetrics
from moe_worker.service.servicers import InferenceService, Phase, Served
from moe_worker.service.validation import largest_request_bytes
from moe_worker.service.watchdog import STALL_TIMEOUT_S
from moe_worker.service.wire import Start
from moe_worker.service.worker_servicer import WorkerService

SERVICES = ("moe_api.inference.v1.InferenceService", "moe_api.worker.v1.WorkerService")
# Time for calls that are still open when the worker ends (last responses, errors).
CLOSE_GRACE_S = 2.0
# A pod is killed 60 s after SIGTERM by default; the work after the last stream takes a part of that.
GRACE_S = 55.0
# Few frontends carry the calls of all clients, each over one connection.
MOST_STREAMS = 1024
# Interval of asking the engine for expert statistics, while it computes and metrics are sent.
EXPERTS_PERIOD_S = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeSettings:
    """model: checkpoint directory; served_name: what clients ask for; listen: HOST:PORT.

    revision: identifies the model and how it is served; workers of one revision continue each other's
    streams. stall_timeout_s: an engine without a step for this long, with requests to compute, is killed.
    write_timeout_s: a stream whose client reads nothing for this long is stopped. grace_s: how long requests
    may continue after SIGTERM; then their streams end with UNAVAILABLE. metrics_port: where Prometheus
    fetches metrics; 0 for nowhere. tls: folder with the certificate, whose authorities clients need one of;
    None for plaintext. health: HOST:PORT of a port for probes alone; None for none.
    """

    model: Path
    served_name: str
    listen: str
    options: EngineOptions
    revision: str = ""
    stall_timeout_s: float = STALL_TIMEOUT_S
    write_timeout_s: float = WRITE_TIMEOUT_S
    grace_s: float = GRACE_S
    metrics_port: int = 0
    tls: Path | None = None
    health: str | None = None


class StoppedError(WorkerError):
    """The worker has to stop and has no time left for the running streams."""

    retryable = True


@dataclass(frozen=True)
class Stop:
    """Signals that tell the worker to end.

    drain: set when it shall accept no more requests. now: set when it shall stop waiting for active ones.
    """

    drain: asyncio.Event = field(default_factory=asyncio.Event)
    now: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class _Model:
    """The parts of a checkpoint that the edge needs."""

    directory: Path
    config: ModelConfig
    context_length: int
    tokenizer: Tokenizer
    defaults: SamplingParameters
    chat_template: ChatTemplate | None

    @classmethod
    def load(cls, settings: ServeSettings) -> "_Model":
        """Reads it; takes a second for a large vocabulary. Raises CheckpointError and SettingsError."""
        directory = find_checkpoint(settings.model)
        config = read_checkpoint_config(directory, settings.options.config_override)
        context_length = settings.options.context_for(config.max_position_embeddings)
        tokenizer = load_guarded(directory, config)
        defaults = sampling_defaults(directory, settings.options.generation_config)
        return cls(directory, config, context_length, tokenizer, defaults, chat_template(directory))

    def served(self, settings: ServeSettings, engine: EngineClient) -> Served:
        """The model as the RPCs see it, once the engine has loaded it."""
        return Served(
            settings.served_name,
            self.config,
            self.context_length,
            self.tokenizer,
            engine,
            settings.revision,
            self.defaults,
            self.chat_template,
        )


def serve(settings: ServeSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises WorkerError."""
    server = metrics_server(settings.metrics_port)
    with telemetry.configure("moe-worker", readers=metric_readers(server)) as handle:
        asyncio.run(_serve(settings, server, measured=handle.measures))


def metric_readers(server: MetricsServer | None) -> list[MetricReader]:
    """What reads metrics besides a collector."""
    return [] if server is None else [PrometheusMetricReader()]


def metrics_server(port: int) -> MetricsServer | None:
    """Serves metrics for Prometheus, if that is asked for."""
    try:
        return MetricsServer(port) if port else None
    except PortTakenError as error:
        raise SettingsError(f"{error}; set another --metrics-port") from error


async def _serve(settings: ServeSettings, scraped: MetricsServer | None, *, measured: bool) -> None:
    stop = stop_on_signal(settings.grace_s)
    model = await asyncio.to_thread(_Model.load, settings)
    inference = InferenceService(
        trace.get_tracer("moe_worker"), metrics.get_meter("moe_worker"), settings.write_timeout_s
    )
    health, supervisor = Health(SERVICES), Supervisor()
    if scraped is not None:
        scraped.start(supervisor)
    most_bytes = largest_request_bytes(model.tokenizer, model.config.vocab_size, model.context_length)
    secured = credentials(settings.tls, supervisor)
    server = await _listen(settings.listen, most_bytes, inference, health, stop, secured)
    beside = await probes(health, settings.health)
    try:
        engine = await EngineClient.start(
            Start(str(model.directory), settings.options), settings.stall_timeout_s
        )
        try:
            if await unless_stopped(engine.loaded(), stop.drain):
                inference.served = model.served(settings, engine)
                await _run(inference.served, inference, health, stop, supervisor, measured=measured)
        finally:
            await engine.stop()
    finally:
        await inference.close()
        if scraped is not None:
            await asyncio.to_thread(scraped.stop)
        await supervisor.close()
        await health.close()
        for one in (server, *beside):
            await one.stop(CLOSE_GRACE_S)


def stop_on_signal(grace_s: float) -> Stop:
    """SIGTERM and SIGINT drain for at most `grace_s`; a second signal ends the process at once.

    Not by the default action, which the kernel does not apply to a container's first process.
    """
    loop, stop, numbers = asyncio.get_running_loop(), Stop(), (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        stop.drain.set()
        loop.call_later(grace_s, stop.now.set)
        for number in numbers:
            loop.add_signal_handler(number, os._exit, 128 + number)

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    return stop


async def _listen(
    address: str,
    most_bytes: int,
    inference: InferenceService,
    health: Health,
    stop: Stop,
    secured: grpc.ServerCredentials | None = None,
) -> grpc.aio.Server:
    """Responds to probes from here on, and refuses requests with UNAVAILABLE."""
    server = create_server(transport.server_options(most_bytes, MOST_STREAMS))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(inference, stop.drain), server)
    await health.register(server)
    port = bind(server, address, secured)
    await server.start()
    log.info("listening on port %d, loading the model", port)
    return server


async def _run(
    served: Served,
    inference: InferenceService,
    health: Health,
    stop: Stop,
    supervisor: Supervisor,
    *,
    measured: bool,
) -> None:
    """Serves from here on. Raises EngineDiedError."""
    spare_loaded()
    inference.phase = Phase.SERVING
    await health.set_ready(ready=True)
    log.info("serving %s (%s)", served.name, served.engine.format)
    async with _measuring(served.engine, supervisor) if measured else contextlib.nullcontext():
        await _run_until_drained(served.engine, inference, health, stop, supervisor)


@contextlib.asynccontextmanager
async def _measuring(engine: EngineClient, supervisor: Supervisor) -> AsyncIterator[None]:
    """Records the engine's reports in the instruments."""
    measures = EngineMetrics(metrics.get_meter("moe_worker"), engine)
    engine.on_step = measures.step
    following = supervisor.start("expert statistics", lambda: _follow_experts(engine, measures))
    try:
        yield
    finally:
        following.cancel()


async def _follow_experts(engine: EngineClient, measures: EngineMetrics) -> None:
    """Asks the engine periodically, so that no step waits for it; ends with the engine."""
    steps = 0
    with contextlib.suppress(EngineDiedError, StoppedError):
        while True:
            await asyncio.sleep(EXPERTS_PERIOD_S)
            if engine.statistics.steps != steps:
                steps = engine.statistics.steps
                measures.count_experts(await engine.expert_statistics())


async def unless_stopped(loading: Coroutine[None, None, None], stop: asyncio.Event) -> bool:
    """Waits for `loading` or `stop`; returns False after `stop`, whatever the result of `loading`."""
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
    engine: EngineClient, inference: InferenceService, health: Health, stop: Stop, supervisor: Supervisor
) -> None:
    """Raises EngineDiedError if the engine ends first."""
    running, drained = (
        asyncio.ensure_future(engine.run(supervisor)),
        asyncio.ensure_future(_drain(engine, inference, health, stop)),
    )
    await asyncio.wait((running, drained), return_when=asyncio.FIRST_COMPLETED)
    if running.done() and not drained.done():
        drained.cancel()
        inference.phase = Phase.DRAINING
        await health.set_ready(ready=False)
        raise running.result()
    running.cancel()
    drained.result()


async def _drain(engine: EngineClient, inference: InferenceService, health: Health, stop: Stop) -> None:
    """Waits for the signal to drain, then accepts no more requests and returns after the last active one.

    Streams that still run when the time is over end with StoppedError: another worker continues them.
    """
    await stop.drain.wait()
    inference.phase = Phase.DRAINING
    await health.set_ready(ready=False)
    log.info("draining: %d active requests", engine.requests)
    if not await unless_stopped(engine.until_idle(), stop.now):
        log.warning("%d requests did not end in time; they are handed off", engine.requests)
        engine.abandon(StoppedError("this worker stopped before the text was complete; another continues it"))
