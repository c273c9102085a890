"""The command `moe-frontend`."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Final

import click
from opentelemetry import metrics, trace

from moe_api import telemetry
from moe_api.address import check_address
from moe_api.visible import LOG_MOST, guard_logs, one_line
from moe_operator.errors import InstallationError, MoEOperatorError
from moe_operator.frontend import routing
from moe_operator.frontend.endpoints import Endpoint, static_endpoints
from moe_operator.frontend.forwarding import Forwarder
from moe_operator.frontend.holding import Hold
from moe_operator.frontend.probing import Prober
from moe_operator.frontend.replicas import Replicas
from moe_operator.frontend.service import Frontend

_LOG: Final = logging.getLogger("moe-frontend")
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class _Addresses(click.ParamType[tuple[str, ...]]):
    """``HOST:PORT[,HOST:PORT...]``."""

    name = "HOST:PORT,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        try:
            return tuple(check_address(part) for part in str(value).split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(epilog="Stop it with SIGTERM: running streams finish, within --grace seconds.")
@click.option(
    "--listen",
    type=_Addresses(),
    default="0.0.0.0:8000",
    show_default=True,
    metavar="HOST:PORT",
    help="Address to serve on; port 0 takes a free one.",
)
@click.option("--namespace", default="default", show_default=True, help="Namespace of the deployment.")
@click.option("--deployment", help="Name of the MoEDeployment; its workers are found by EndpointSlices.")
@click.option("--static", type=_Addresses(), help="Workers by address instead, without Kubernetes.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=25.0,
    show_default=True,
    help="Seconds that running requests get to finish after SIGTERM. Keep it below the pod's "
    "terminationGracePeriodSeconds (30 by default).",
)
@click.option(
    "--hold",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="For deployments that scale to zero: seconds that a request waits for a first worker. The operator "
    "starts one when it sees requests wait.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=routing.PATIENCE_S,
    show_default=True,
    help="Seconds that a request waits while no worker is ready, and that a stream which lost its worker "
    "waits for another one of the same revision.",
)
def main(
    listen: tuple[str, ...],
    namespace: str,
    deployment: str | None,
    static: tuple[str, ...] | None,
    grace: float,
    hold: float,
    patience: float,
) -> None:
    """Routes requests to the replicas of a MoEDeployment.

    Serves moe_api.inference.v1.InferenceService, grpc.health.v1 and reflection. A request goes to the
    replica with the fewest requests in flight. Where a worker dies, another replica of the same revision
    goes on with its streams, without a lost or repeated token. Health service "" is SERVING while at least
    one worker is ready, for --patience after the last one was lost, and where one is made for requests
    (--hold); "liveness" always.

    \b
    In a cluster:      moe-frontend --namespace prod --deployment deepseek
    Without a cluster: moe-frontend --listen 127.0.0.1:8000 --static 127.0.0.1:8001,127.0.0.1:8002

    Traces are sent when OTEL_EXPORTER_OTLP_ENDPOINT names an OpenTelemetry Collector.
    """
    if (deployment is None) == (static is None):
        raise click.UsageError(
            "say where the workers are, by one of --deployment NAME and --static HOST:PORT,..."
        )
    guard_logs()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        with telemetry.configure("moe-frontend"):
            holding = Hold(hold or patience, deployment or "this frontend", from_zero=hold > 0)
            asyncio.run(_serve(listen[0], namespace, deployment, static or (), (grace, patience), holding))
    except MoEOperatorError as error:
        click.echo(f"error: {one_line(str(error), LOG_MOST)}", err=True)
        sys.exit(2)


async def _serve(
    listen: str,
    namespace: str,
    deployment: str | None,
    static: tuple[str, ...],
    limits_s: tuple[float, float],
    hold: Hold,
) -> None:
    grace_s, patience_s = limits_s
    replicas = Replicas()
    tracer = trace.get_tracer("moe_operator.frontend")
    hold.measure(metrics.get_meter("moe_operator.frontend"))
    frontend = Frontend(Forwarder(replicas, tracer, hold, patience_s), hold)
    await frontend.set_ready(ready=False)
    changes: asyncio.Queue[frozenset[Endpoint]] = asyncio.Queue()
    with _discovery(changes, namespace, deployment, static), _stop_signal() as stop:
        port = await _listen(frontend, listen)
        _LOG.info("serving on %s:%d", listen.rpartition(":")[0], port)
        async with _following(changes, replicas, frontend):
            await stop.wait()
            _LOG.info("draining for %g s at most", grace_s)
            await frontend.drain(grace_s)
    await replicas.close()


async def _listen(frontend: Frontend, address: str) -> int:
    try:
        return await frontend.start(address)
    except RuntimeError as error:
        raise InstallationError(
            f"cannot listen on {address}; is the port taken, or the address another machine's?"
        ) from error


@contextlib.asynccontextmanager
async def _following(
    changes: "asyncio.Queue[frozenset[Endpoint]]", replicas: Replicas, frontend: Frontend
) -> AsyncIterator[None]:
    """Keeps the replicas to those endpoints that take requests."""
    serving: asyncio.Queue[frozenset[Endpoint]] = asyncio.Queue()
    prober = Prober(serving.put_nowait)

    async def probe() -> None:
        while True:
            prober.update(await changes.get())

    async def route() -> None:
        while True:
            endpoints = await serving.get()
            replicas.update(endpoints)
            await frontend.set_ready(ready=len(endpoints) > 0)
            _LOG.info("replicas: %s", ", ".join(sorted(e.name for e in endpoints)) or "none")

    tasks = [asyncio.create_task(probe()), asyncio.create_task(route())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await prober.close()


@contextlib.contextmanager
def _discovery(
    changes: "asyncio.Queue[frozenset[Endpoint]]",
    namespace: str,
    deployment: str | None,
    static: tuple[str, ...],
) -> Iterator[None]:
    if deployment is None:
        changes.put_nowait(static_endpoints(static))
        yield
        return
    # Importing the Kubernetes client takes half a second, which a frontend without a cluster saves.
    from moe_operator.frontend import discovery  # noqa: PLC0415

    loop = asyncio.get_running_loop()

    def publish(endpoints: frozenset[Endpoint]) -> None:
        loop.call_soon_threadsafe(changes.put_nowait, endpoints)

    watcher = discovery.SliceWatcher(discovery.cluster_api(), namespace, f"{deployment}-workers", publish)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


@contextlib.contextmanager
def _stop_signal() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second signal ends the process at once.

    Not by the default action: the kernel spares a container's first process from that.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_signal() -> None:
        stop.set()
        for number in _SIGNALS:
            loop.add_signal_handler(number, os._exit, 128 + number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
