"""Asks frontends where they send requests."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_operator.manifests.observed import Pod
from moe_operator.resources import names
from moe_operator.rpc.leader import target


def routed(frontends: Iterable[Pod], timeout_seconds: float) -> dict[str, str]:
    """IP addresses, by name, of the leaders to which every one of the frontends sends requests.

    One that does not answer sends none, unless it is not Ready: then no client reaches it either. None are
    routed where there is no frontend.
    """
    asked = [(pod, _routes(pod.address, timeout_seconds)) for pod in frontends if pod.address]
    known = [routes or frozenset() for pod, routes in asked if pod.ready or routes is not None]
    return dict(frozenset.intersection(*known)) if known else {}


def _routes(address: str, timeout_seconds: float) -> frozenset[tuple[str, str]] | None:
    with grpc.insecure_channel(target(address)) as channel:
        try:
            stub = frontend_pb2_grpc.FrontendServiceStub(channel)
            found = stub.GetRoutes(frontend_pb2.GetRoutesRequest(), timeout=timeout_seconds).routes
        except grpc.RpcError:
            return None
    return frozenset((route.name, _host(route.address)) for route in found)


def _host(address: str) -> str:
    return address.removesuffix(f":{names.GRPC_PORT}").strip("[]")
