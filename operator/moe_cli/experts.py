"""`moe experts`: which experts a worker's tokens use."""

from __future__ import annotations

from collections.abc import Iterator

import click
import grpc

from moe_api import transport
from moe_api.visible import one_line
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_client.calling import explain, model_options
from moe_client.endpoint import Endpoint

_LONGEST_NAME = 40
_DOMAINS_SHOWN = 3


@click.command()
@model_options
@click.option(
    "--top", type=click.IntRange(1, 64), default=4, show_default=True, help="Experts of a layer shown."
)
def experts(endpoint: Endpoint, model: str, timeout: float | None, top: int) -> None:
    """Prints the load of the experts of one worker.

    Of each layer: the activated experts in a step, how evenly experts share the tokens (mean over the largest
    load), and the busiest experts. Where the worker learns domains (--learn-routing), those that use an
    expert most stand behind it.

    \b
    Workers have no Service:
      kubectl port-forward pod/NAME-0-0 8000 && moe experts
    """
    del model  # a worker serves one
    with endpoint.channel(transport.CLIENT_OPTIONS) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            load = stub.GetExpertLoad(worker_pb2.GetExpertLoadRequest(), timeout=timeout or 10)
        except grpc.RpcError as error:
            raise explain(error, endpoint) from error
    for line in lines(load, top):
        click.echo(line)


def lines(load: worker_pb2.ExpertLoad, top: int) -> Iterator[str]:
    """What is printed. Pure."""
    yield f"{load.steps:,} steps"
    for index, layer in enumerate(load.layers):
        total, most = sum(layer.tokens), max(layer.tokens, default=0)
        if not most:
            continue
        activated, even = layer.active / max(1, load.steps), total / len(layer.tokens) / most
        busiest = sorted(range(len(layer.tokens)), key=lambda expert: -layer.tokens[expert])[:top]
        shown = ", ".join(_expert(load, index, expert, layer.tokens[expert] / total) for expert in busiest)
        yield f"layer {layer.layer}: {activated:.1f} experts a step, utilisation {even:.0%}; busiest {shown}"
    if load.domains:
        names = ", ".join(
            f"{one_line(domain.name, _LONGEST_NAME)} ({domain.tokens:,} tokens)" for domain in load.domains
        )
        fit = f"{load.fit:.0%}" if load.HasField("fit") else "unknown yet"
        yield f"domains: {names}; fit {fit}"


def _expert(load: worker_pb2.ExpertLoad, layer: int, expert: int, share: float) -> str:
    """An expert, its share of the tokens, and the domains that use it more than evenly."""
    affinities = [
        (domain.shares[layer].experts[expert], one_line(domain.name, _LONGEST_NAME))
        for domain in load.domains
        if layer < len(domain.shares) and expert < len(domain.shares[layer].experts)
    ]
    even = 1 / len(load.layers[layer].tokens)
    top = [name for value, name in sorted(affinities, reverse=True)[:_DOMAINS_SHOWN] if value > even]
    return f"{expert} ({share:.0%}{': ' + ' '.join(top) if top else ''})"
