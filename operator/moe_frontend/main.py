"""The command `moe-frontend`."""

import asyncio
import dataclasses
import logging
import sys
from typing import Any

import click
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics.export import MetricReader

from moe_api import telemetry
from moe_api.ranges import FiniteRange
from moe_api.visible import LOG_MOST, guard_logs, one_line
from moe_api.writing import WRITE_TIMEOUT_S
from moe_frontend.edges import Guards
from moe_frontend.parameters import FOLDER, Addresses, KeySet, MetadataKeys, Tenants
from moe_frontend.policy import balancing, routing
from moe_frontend.serving import Options, serve
from moe_frontend.transport import metadata
from moe_operator.errors import MoEOperatorError


@click.command(epilog="Stop it with SIGTERM: running streams finish, within --grace seconds.")
@click.option(
    "--listen",
    type=Addresses(),
    default="0.0.0.0:8000",
    show_default=True,
    metavar="HOST:PORT",
    help="Address to serve on; port 0 takes a free one. 0.0.0.0 and [::]: all addresses, of IPv4 and IPv6.",
)
@click.option(
    "--http",
    type=Addresses(),
    envvar="MOE_HTTP",
    show_envvar=True,
    metavar="HOST:PORT",
    help="Serves OpenAI's HTTP API (docs/openai-api.md) and /metrics here as well; port 0 takes a free one. "
    "Default: none.",
)
@click.option("--namespace", default="default", show_default=True, help="Namespace of the deployment.")
@click.option(
    "--deployment",
    help="Name of the MoEDeployment; its workers are found by EndpointSlices. Default: none, with --static.",
)
@click.option(
    "--static",
    type=Addresses(),
    help="Workers by address instead, without Kubernetes. Default: none, with --deployment.",
)
@click.option(
    "--grace",
    type=FiniteRange(min=0),
    default=25.0,
    show_default=True,
    help="Seconds that running requests get to finish after SIGTERM. Keep it below the pod's "
    "terminationGracePeriodSeconds; the operator passes that of the spec (60 by default) less 5 s.",
)
@click.option(
    "--hold",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="For deployments that scale to zero: seconds that a request waits for a first worker. The operator "
    "starts one when it sees requests wait.",
)
@click.option(
    "--patience",
    type=FiniteRange(min=0),
    default=routing.PATIENCE_S,
    show_default=True,
    help="Seconds that a request waits while no worker is ready, and that a stream which lost its worker "
    "waits for another one of the same revision.",
)
@click.option(
    "--write-timeout",
    type=FiniteRange(min=0, min_open=True),
    default=WRITE_TIMEOUT_S,
    show_default=True,
    help="Seconds that a message may wait for a client to read it; then the stream is stopped, and its "
    "worker is free.",
)
@click.option(
    "--forward-metadata",
    type=MetadataKeys(),
    default=",".join(sorted(metadata.DEFAULT_KEYS)),
    envvar="MOE_FORWARD_METADATA",
    show_default=True,
    show_envvar=True,
    metavar="KEY,...",
    help="Metadata of requests that reach workers, and of answers that reach clients. The W3C trace context "
    "always does; credentials (authorization, cookie) never do.",
)
@click.option(
    "--output-cache",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    envvar="MOE_OUTPUT_CACHE",
    show_envvar=True,
    metavar="BYTES",
    help="Memory for complete answers to requests with temperature 0 or a seed; equal requests are answered "
    "from it, if the workers have a --revision (docs/caching.md). 0: no cache.",
)
@click.option(
    "--output-cache-ttl",
    type=FiniteRange(min=0, min_open=True),
    default=3600.0,
    show_default=True,
    envvar="MOE_OUTPUT_CACHE_TTL",
    show_envvar=True,
    help="Seconds that an answer in the output cache is valid.",
)
@click.option(
    "--routing",
    type=click.Choice(sorted(balancing.POLICIES)),
    default="least-loaded",
    show_default=True,
    envvar="MOE_ROUTING",
    show_envvar=True,
    help="Which replica takes a request. least-loaded: the one with the fewest requests in flight. "
    "prefix-affinity: the one with the least to compute, because it has computed the beginning of the "
    "prompt before. prefix-affinity-exact: the same, but replicas report what they have cached; use it with "
    "several frontends. session: the same one for all requests of a session (metadata x-session-id). "
    "random-of-two: the less loaded of two. weighted: the fewest requests for its measured speed.",
)
@click.option(
    "--tenants",
    type=Tenants(),
    default="",
    envvar="MOE_TENANTS",
    show_envvar=True,
    metavar="JSON",
    help="What tenants may use (docs/tenants.md), as in spec.frontend: "
    '{"tenants": [{"name": "a", "weight": 2, "requestsPerMinute": 60}], '
    '"defaultTenant": {"concurrency": 8}}. Default: no limits.',
)
@click.option(
    "--tls",
    type=FOLDER,
    envvar="MOE_TLS",
    show_envvar=True,
    metavar="FOLDER",
    help="Serves clients of gRPC and HTTP over TLS, with tls.crt and tls.key of this folder (a mounted "
    "Secret); a renewed certificate is used within seconds, for new connections. Default: plaintext.",
)
@click.option(
    "--internal-tls",
    type=FOLDER,
    envvar="MOE_INTERNAL_TLS",
    show_envvar=True,
    metavar="FOLDER",
    help="Connects to workers over mutual TLS, with tls.crt, tls.key and ca.crt of this folder (a mounted "
    "Secret), and serves --admin with it; renewed certificates are used within seconds. In a cluster it "
    "still reaches workers in plaintext whose port is named grpc. Default: plaintext.",
)
@click.option(
    "--api-keys",
    type=FOLDER,
    envvar="MOE_API_KEYS",
    show_envvar=True,
    metavar="FOLDER",
    help="Only callers that send a key of this folder, or a token (--jwks), are accepted. It has a file for "
    "each tenant with the digests of its keys (`moe key` makes one). Changes apply within seconds. "
    "Default: none.",
)
@click.option(
    "--jwks",
    type=KeySet(),
    envvar="MOE_JWKS",
    show_envvar=True,
    metavar="URL|FOLDER",
    help="Only callers that send a JSON Web Token signed by one of these keys, or an API key (--api-keys), "
    "are accepted: an https:// URL of a JSON Web Key Set, or a folder with jwks.json. Needs --jwt-issuer and "
    "--jwt-audience. Default: none.",
)
@click.option(
    "--jwt-issuer",
    default="",
    envvar="MOE_JWT_ISSUER",
    show_envvar=True,
    help="The iss of tokens. Default: none.",
)
@click.option(
    "--jwt-audience",
    default="",
    envvar="MOE_JWT_AUDIENCE",
    show_envvar=True,
    help="An aud of tokens. Default: none.",
)
@click.option(
    "--jwt-tenant-claim",
    default="sub",
    envvar="MOE_JWT_TENANT_CLAIM",
    show_default=True,
    show_envvar=True,
    help="The claim of tokens that names the tenant.",
)
@click.option(
    "--audit-log/--no-audit-log",
    default=False,
    envvar="MOE_AUDIT_LOG",
    show_default=True,
    show_envvar=True,
    help="Prints a line of JSON to standard output for each request: time, tenant, caller, method, status, "
    "tokens and duration, never a prompt or an answer.",
)
@click.option(
    "--admin",
    type=Addresses(),
    envvar="MOE_ADMIN",
    show_envvar=True,
    metavar="HOST:PORT",
    help="Serves the operator and probes here instead of on the port of clients: in plaintext, or with "
    "--internal-tls to those with a certificate. Default: none.",
)
@click.option(
    "--health",
    type=Addresses(),
    envvar="MOE_HEALTH",
    show_envvar=True,
    metavar="HOST:PORT",
    help="Serves probes here as well, in plaintext, and nothing else. Default: none.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=0,
    envvar="MOE_METRICS_PORT",
    show_envvar=True,
    help="Serves /metrics on this port instead of on the port of --http. Default: that of --http.",
)
def main(**given: Any) -> None:
    """Routes requests to the replicas of a MoEDeployment.

    Serves moe_api.inference.v1.InferenceService, grpc.health.v1 and reflection; with --http also OpenAI's
    API. A request goes to the replica that --routing chooses. If a worker dies, another
    replica of the same revision continues its streams, without a lost or repeated token. Health service ""
    is SERVING while at least one worker is ready, for --patience after the last one was lost, and always with
    --hold; "liveness" always.

    \b
    In a cluster:      moe-frontend --namespace prod --deployment deepseek
    Without a cluster: moe-frontend --listen 127.0.0.1:8000 --static 127.0.0.1:8001,127.0.0.1:8002

    Traces are sent when OTEL_EXPORTER_OTLP_ENDPOINT names an OpenTelemetry Collector.
    """
    guards = Guards(**{field.name: given.pop(field.name) for field in dataclasses.fields(Guards)})
    options = Options(**given, guards=guards)
    if guards.jwks and not (guards.jwt_issuer and guards.jwt_audience):
        raise click.UsageError(
            "--jwks accepts tokens of one issuer for one audience; give --jwt-issuer and --jwt-audience"
        )
    if (options.deployment is None) == (options.static is None):
        problem = "no workers given" if options.static is None else "workers given twice"
        raise click.UsageError(f"{problem}; use one of --deployment NAME and --static HOST:PORT,...")
    guard_logs()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        with telemetry.configure("moe-frontend", readers=_readers(options)):
            asyncio.run(serve(options))
    except MoEOperatorError as error:
        click.echo(f"error: {one_line(str(error), LOG_MOST)}", err=True)
        sys.exit(2)


def _readers(options: Options) -> list[MetricReader]:
    """Who else reads metrics: Prometheus, at /metrics."""
    return [PrometheusMetricReader()] if options.http or options.metrics_port else []
