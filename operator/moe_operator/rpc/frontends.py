"""Reads the routes of frontends: from their published FrontendRoutes, otherwise by gRPC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import grpc

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_operator.observed.pods import Pod
from moe_operator.observed.routes import Routes, host
from moe_operator.rpc.dialing import PLAINTEXT, Dialer
from moe_operator.rpc.together import ask


def routed(
    frontends: Iterable[Pod],
    leaders: Iterable[Pod],
    timeout_seconds: float,
    published: Mapping[str, Routes],
    dialer: Dialer = PLAINTEXT,
) -> dict[str, str]:
    """The leaders to which every frontend routes: IP addresses by name. Empty if there is no frontend.

    Only Ready frontends count, for clients reach no other; one that does not respond has no routes. While
    none is Ready, as at the start, those count that say their routes. A terminating or ended pod is ignored,
    because it gets no new requests. A frontend of a version without GetRoutes routes to all leaders in the
    EndpointSlices.

    published: the published routes of frontends (routes.published). These frontends are not asked, so the
    operator need not reach them. What a frontend that crashed has published is out of date.
    """
    everything = frozenset((leader.name, address) for leader in leaders for address in leader.addresses)

    def routes(pod: Pod) -> Routes | None:
        if pod.uid in published:
            return published[pod.uid]
        return _routes(dialer, pod.admin_address, everything, timeout_seconds)

    reachable = [pod for pod in frontends if pod.reachable]
    serving = [pod for pod in reachable if pod.ready]
    answers = [found for _, found in ask(routes, serving or reachable)]
    known = [found or frozenset() for found in answers if serving or found is not None]
    return dict(everything.intersection(*known)) if known else {}


def _routes(dialer: Dialer, address: str, everything: Routes, timeout_seconds: float) -> Routes | None:
    """The routes of one frontend, as names and addresses; None if it does not respond."""
    with dialer.channel(address) as channel:
        try:
            stub = frontend_pb2_grpc.FrontendServiceStub(channel)
            found = stub.GetRoutes(frontend_pb2.GetRoutesRequest(), timeout=timeout_seconds).routes
        except grpc.RpcError as error:
            return everything if error.code() is grpc.StatusCode.UNIMPLEMENTED else None
    return frozenset((route.name, host(route.address)) for route in found)
