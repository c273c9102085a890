"""Asks frontends where they send requests."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_operator.manifests.observed import Pod
from moe_operator.resources import names
from moe_operator.rpc.leader import target
from moe_operator.rpc.together import ask

_Routes = frozenset[tuple[str, str]]


def routed(frontends: Iterable[Pod], leaders: Iterable[Pod], timeout_seconds: float) -> dict[str, str]:
    """IP addresses, by name, of those leaders to which every one of the frontends sends requests.

    One that does not answer sends none, unless it is not Ready: then no client reaches it either. No new
    request reaches a terminating one, whatever it answers. One of an earlier version, which knows no such
    question, goes by what Kubernetes says. None are routed where there is no frontend.
    """
    everything = frozenset((leader.name, leader.address) for leader in leaders)
    reachable = (pod for pod in frontends if pod.address and not pod.terminating)
    asked = ask(lambda pod: _routes(pod.address, everything, timeout_seconds), reachable)
    known = [routes or frozenset() for pod, routes in asked if pod.ready or routes is not None]
    return dict(everything.intersection(*known)) if known else {}


def _routes(address: str, everything: _Routes, timeout_seconds: float) -> _Routes | None:
    """Names and addresses; None where it does not answer."""
    with grpc.insecure_channel(target(address)) as channel:
        try:
            stub = frontend_pb2_grpc.FrontendServiceStub(channel)
            found = stub.GetRoutes(frontend_pb2.GetRoutesRequest(), timeout=timeout_seconds).routes
        except grpc.RpcError as error:
            return everything if error.code() is grpc.StatusCode.UNIMPLEMENTED else None
    return frozenset((route.name, _host(route.address)) for route in found)


def _host(address: str) -> str:
    return address.removesuffix(f":{names.GRPC_PORT}").strip("[]")
