"""The life of a frontend: listen, follow the workers, serve, drain, end."""

import asyncio
import contextlib
import functools
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry import metrics, trace

from moe_api.receiving import InProgress
from moe_api.supervision import Supervisor
from moe_frontend import edges, listening
from moe_frontend.chat.renderer import Renderer
from moe_frontend.discovery.connecting import Connector
from moe_frontend.discovery.endpoints import Endpoint, static_endpoints
from moe_frontend.discovery.probing import Prober
from moe_frontend.edges import Edge, Guards
from moe_frontend.http.app import Api
from moe_frontend.http.bodies import Bodies
from moe_frontend.http.server import HttpServer
from moe_frontend.outputs.cache import OutputCache
from moe_frontend.outputs.store import Store
from moe_frontend.policy import balancing
from moe_frontend.policy.tenants import TenantsConfig
from moe_frontend.rpc.chat import ChatService
from moe_frontend.transport import failures
from moe_frontend.transport.admission import Admission
from moe_frontend.transport.failures import Failure
from moe_frontend.transport.forwarding import Forwarder
from moe_frontend.transport.holding import NO_DEPLOYMENT, Hold
from moe_frontend.transport.loads import LoadPolling
from moe_frontend.transport.replicas import Replicas
from moe_frontend.transport.service import Frontend
from moe_frontend.transport.watching import CacheWatching
from moe_operator.errors import MoEOperatorError
from moe_operator.resources import names

_LOG: Final = logging.getLogger("moe-frontend")
_SCOPE: Final = "moe_operator.frontend"
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Options:
    """What the command line says; times are in seconds.

    listen: one address, ``HOST:PORT``, of gRPC.
    http: one of OpenAI's API, if it is served.
    deployment, static: where the workers are, one of the two.
    forward_metadata: keys that pass between clients and workers.
    output_cache: bytes of the output cache; 0: there is none.
    output_cache_ttl: how long its answers are valid.
    routing: name of the policy (balancing.POLICIES).
    tenants: what they may use.
    guards: TLS and authentication of the client ports.
    admin: address for the operator and for probes; None: they use that of gRPC.
    health: address for probes, where `admin` asks for a certificate; None: they use the others.
    metrics_port: where Prometheus may fetch metrics; 0: at /metrics of the HTTP port.
    """

    listen: tuple[str, ...]
    http: tuple[str, ...] | None
    namespace: str
    deployment: str | None
    static: tuple[str, ...] | None
    grace: float
    hold: float
    patience: float
    write_timeout: float
    forward_metadata: frozenset[str]
    output_cache: int
    output_cache_ttl: float
    routing: str
    tenants: TenantsConfig
    guards: Guards
    admin: tuple[str, ...] | None
    health: tuple[str, ...] | None
    metrics_port: int


async def serve(options: Options) -> None:
    """Serves until SIGTERM or SIGINT, then drains.

    Raises:
        InstallationError: there is no cluster, or the address cannot be listened on.
    """
    supervisor = Supervisor(expected=(MoEOperatorError,))
    edge = edges.edge_of(options.guards, supervisor)
    connector = Connector(None if edge.internal is None else edge.internal.pair)
    policy = balancing.POLICIES[options.routing]()
    replicas = Replicas(supervisor=supervisor, policy=policy, connector=connector)
    if edge.internal is not None:
        edge.internal.on_renewal(replicas.reconnect)
    if isinstance(policy, balancing.ExactPrefixAffinity):
        CacheWatching(replicas, policy.index, supervisor).measure(metrics.get_meter(_SCOPE))
    polling = LoadPolling(replicas)
    polling.measure(metrics.get_meter(_SCOPE))
    supervisor.start("replica-loads", polling.run)
    outputs = _outputs(options, supervisor)
    forwarder, hold = _forwarder(options, replicas, outputs)
    edge.measure(metrics.get_meter(_SCOPE))
    in_progress, renderer = InProgress(), Renderer()
    frontend = Frontend(forwarder, hold, supervisor, edge.authenticator, edge.log, in_progress)
    frontend.add(ChatService(forwarder, renderer, trace.get_tracer(_SCOPE), frontend.serve).register)
    await frontend.set_ready(ready=False)
    with _stop_signal() as stop, listening.serving_metrics(options.metrics_port, supervisor):
        sums = functools.partial(_sums, forwarder, outputs)
        async with _following(options, replicas, frontend, supervisor, outputs, sums):
            # Pods are ready by gRPC's health, so HTTP comes first.
            api = Api(
                forwarder,
                trace.get_tracer(_SCOPE),
                lambda: frontend.ready,
                Bodies(in_progress=in_progress),
                renderer,
                edge.authenticator,
                measured=not options.metrics_port,
            )
            http = await _listen_http(options, api, supervisor, edge)
            await listening.listen(frontend, options.listen[0], edge, options.admin, options.health)
            await stop.wait()
            _LOG.info("draining for %g s at most", options.grace)
            await asyncio.gather(frontend.drain(options.grace), *(port.drain(options.grace) for port in http))
    await renderer.close()
    await replicas.close()
    await edge.close()
    await supervisor.close()


def _outputs(options: Options, supervisor: Supervisor) -> OutputCache[Failure] | None:
    if not options.output_cache:
        return None
    outputs = OutputCache(
        Store(options.output_cache, options.output_cache_ttl),
        supervisor,
        failures.stopped(),
        options.write_timeout,
    )
    outputs.measures.export(metrics.get_meter(_SCOPE))
    return outputs


def _forwarder(
    options: Options, replicas: Replicas, outputs: OutputCache[Failure] | None
) -> tuple[Forwarder, Hold]:
    limit_s = options.hold or options.patience
    hold = Hold(limit_s, options.deployment or NO_DEPLOYMENT, from_zero=options.hold > 0)
    hold.measure(metrics.get_meter(_SCOPE))
    admission = Admission(options.tenants)
    admission.measure(metrics.get_meter(_SCOPE))
    forwarder = Forwarder(
        replicas,
        trace.get_tracer(_SCOPE),
        hold,
        options.patience,
        options.forward_metadata,
        options.write_timeout,
        outputs,
    )
    forwarder.limit(admission)
    forwarder.prompts.measure(metrics.get_meter(_SCOPE))
    return forwarder, hold


async def _listen_http(options: Options, api: Api, supervisor: Supervisor, edge: Edge) -> list[HttpServer]:
    """The server of OpenAI's API, where there is one."""
    if not options.http:
        return []
    gate = api.gated(metrics.get_meter(_SCOPE), edge.log)
    server = HttpServer(gate, supervisor, None if edge.tls is None else edge.tls.http)
    await listening.listen_http(server, options.http[0])
    return [server]


@contextlib.asynccontextmanager
async def _following(
    options: Options,
    replicas: Replicas,
    frontend: Frontend,
    supervisor: Supervisor,
    outputs: OutputCache[Failure] | None,
    sums: Callable[[], Mapping[str, int]],
) -> AsyncIterator[None]:
    """Routes requests to the endpoints that take them."""
    news, publish = asyncio.Event(), _publication(options, replicas, supervisor, sums)

    def route() -> None:
        # Without a task in between: on a busy event loop each one costs tens of milliseconds.
        serving = prober.serving
        replicas.update(serving)
        if outputs is not None and serving:
            outputs.serve(frozenset(endpoint.revision for endpoint in serving))
        frontend.set_replicas(there=len(serving) > 0)
        publish()
        news.set()

    async def report() -> None:
        while True:
            news.clear()
            serving = prober.serving
            await frontend.set_ready(ready=len(serving) > 0)
            _LOG.info("replicas: %s", ", ".join(sorted(e.name for e in serving)) or "none")
            await news.wait()

    prober = Prober(route, supervisor, replicas.connector)
    route()
    reporting = supervisor.start("probes", report)
    try:
        with _discovery(options, prober.update, supervisor):
            yield
    finally:
        reporting.cancel()
        await prober.close()


def _sums(forwarder: Forwarder, outputs: OutputCache[Failure] | None) -> dict[str, int]:
    """What caches saved since this frontend started, with the keys of `moe_operator.resources.cache_sums`."""
    found = {"promptTokens": forwarder.prompts.tokens, "cachedPromptTokens": forwarder.prompts.cached}
    return found if outputs is None else found | outputs.measures.sums()


def _publication(
    options: Options, replicas: Replicas, supervisor: Supervisor, sums: Callable[[], Mapping[str, int]]
) -> Callable[[], None]:
    """To be called when the routes are others: in a cluster the operator is told."""
    if options.deployment is None:
        return lambda: None
    from moe_frontend.discovery import publishing, slices  # noqa: PLC0415 - as below

    pod = publishing.own_pod(options.namespace, options.deployment)
    if pod is None:
        return lambda: None
    publisher = publishing.Publisher(slices.cluster_api(), pod, replicas.endpoints, sums)
    supervisor.start("publishing", publisher.run)
    return publisher.changed


@contextlib.contextmanager
def _discovery(
    options: Options, update: Callable[[frozenset[Endpoint]], None], supervisor: Supervisor
) -> Iterator[None]:
    """Tells `update` which endpoints there are, in this event loop."""
    if options.deployment is None:
        secure = options.guards.internal_tls is not None
        update(static_endpoints(options.static or (), secure=secure))
        yield
        return
    # Importing the Kubernetes client takes half a second, which a frontend without a cluster saves.
    from moe_frontend.discovery import slices  # noqa: PLC0415

    loop = asyncio.get_running_loop()

    def publish(endpoints: frozenset[Endpoint]) -> None:
        loop.call_soon_threadsafe(update, endpoints)

    service = names.workers(options.deployment)
    source = slices.slices_of(slices.cluster_api(), options.namespace, service)
    watcher = slices.SliceWatcher(source, service, publish, supervisor)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


@contextlib.contextmanager
def _stop_signal() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second signal acts as usual and ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_signal() -> None:
        stop.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
