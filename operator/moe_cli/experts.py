"""`moe experts`: which experts a worker's tokens use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Protocol

import click
import grpc

from moe_api import mutual, transport
from moe_api.visible import one_line
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_cli.expert_rows import LONGEST_NAME, utilisation
from moe_client.calling import explain, model_options
from moe_client.endpoint import Endpoint, Options
from moe_client.errors import WRONG, CommandError

_DOMAINS_SHOWN = 3


@click.command()
@partial(model_options, timeout_s=10.0)
@click.option(
    "--top", type=click.IntRange(1, 64), default=4, show_default=True, help="Experts of a layer shown."
)
def experts(endpoint: Endpoint, model: str, timeout: float, top: int) -> None:
    """Prints the load of the experts of one worker.

    Of each layer: the activated experts in a step, how evenly experts share the tokens (mean over the largest
    load), and the busiest experts. Where the worker learns domains (--learn-routing), those that use an
    expert most stand behind it.

    \b
    Frontends do not know experts, so forward the port of a worker's pod:
      kubectl port-forward pod/NAME-0-0 8000 & moe experts --tls-folder FOLDER
    With the files of the namespace's Secret moe-internal-frontend in FOLDER (docs/security.md); a worker
    without mutual TLS is asked without it.
    """
    del model  # a worker serves one
    endpoint = as_worker(endpoint)
    (load,) = ask([endpoint], timeout)
    if isinstance(load, grpc.RpcError):
        if load.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise CommandError(
                f"{endpoint} is no worker, which alone knows experts; give a worker's port", WRONG
            )
        raise explain(load, endpoint) from load
    for line in lines(load, top):
        click.echo(line)


def as_worker(endpoint: Endpoint) -> Endpoint:
    """The endpoint, whose certificate has to be a worker's where TLS is mutual."""
    if endpoint.proof is None or endpoint.server_name is not None:
        return endpoint
    return replace(endpoint, server_name=mutual.WORKER)


class Reachable(Protocol):
    """Where a worker listens."""

    def channel(self, options: Options) -> grpc.Channel:
        """A gRPC channel. Raises CommandError if its certificates are none."""


def ask(workers: Sequence[Reachable], timeout_s: float) -> list[worker_pb2.ExpertLoad | grpc.RpcError]:
    """The expert load of each worker, or why there is none.

    Asks all at once, so `timeout_s` bounds the whole.

    Raises:
        CommandError: the files of an endpoint are no certificates.
    """
    with ExitStack() as opened:
        channels = [opened.enter_context(each.channel(transport.CLIENT_OPTIONS)) for each in workers]
        stubs = [worker_pb2_grpc.WorkerServiceStub(channel) for channel in channels]
        request = worker_pb2.GetExpertLoadRequest()
        calls = [stub.GetExpertLoad.future(request, timeout=timeout_s) for stub in stubs]
        return [_outcome(call) for call in calls]


def _outcome(call: grpc.Future[worker_pb2.ExpertLoad]) -> worker_pb2.ExpertLoad | grpc.RpcError:
    try:
        return call.result()
    except grpc.RpcError as error:
        return error


def lines(load: worker_pb2.ExpertLoad, top: int) -> Iterator[str]:
    """What is printed. Pure."""
    yield f"{load.steps:,} steps"
    for index, layer in enumerate(load.layers):
        total, even = sum(layer.tokens), utilisation(layer.tokens)
        if even is None:
            continue
        activated = layer.active / max(1, load.steps)
        busiest = sorted(range(len(layer.tokens)), key=lambda expert: -layer.tokens[expert])[:top]
        shown = ", ".join(_expert(load, index, expert, layer.tokens[expert] / total) for expert in busiest)
        yield f"layer {layer.layer}: {activated:.1f} experts a step, utilisation {even:.0%}; busiest {shown}"
    if load.domains:
        names = ", ".join(
            f"{one_line(domain.name, LONGEST_NAME)} ({domain.tokens:,} tokens)" for domain in load.domains
        )
        fit = f"{load.fit:.0%}" if load.HasField("fit") else "unknown yet"
        yield f"domains: {names}; fit {fit}"


def _expert(load: worker_pb2.ExpertLoad, layer: int, expert: int, share: float) -> str:
    """An expert, its share of the tokens, and the domains that use it more than evenly."""
    affinities = [
        (domain.shares[layer].experts[expert], one_line(domain.name, LONGEST_NAME))
        for domain in load.domains
        if layer < len(domain.shares) and expert < len(domain.shares[layer].experts)
    ]
    even = 1 / len(load.layers[layer].tokens)
    top = [name for value, name in sorted(affinities, reverse=True)[:_DOMAINS_SHOWN] if value > even]
    return f"{expert} ({share:.0%}{': ' + ' '.join(top) if top else ''})"
