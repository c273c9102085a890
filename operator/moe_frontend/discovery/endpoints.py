"""Reads leaders from EndpointSlices. Pure."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from moe_api.address import join
from moe_operator.resources import names


@dataclasses.dataclass(frozen=True, order=True)
class Served:
    """The model of a worker, beyond what routing needs.

    Attributes:
        name: that requests contain.
        context_length: tokens of prompt and text together.
        samples: whether the checkpoint has a default temperature above 0.
        template: chat template in Jinja; "" if unknown.
        special_tokens: variables of the template, with their values.
    """

    name: str = ""
    context_length: int = 0
    samples: bool = False
    template: str = ""
    special_tokens: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, order=True)
class Endpoint:
    """A leader that may accept requests.

    Attributes:
        name: of the pod; the address if there is no pod.
        address: ``HOST:PORT``, with an IPv6 host in brackets.
        revision: that it serves, after the first GetModel.
        context_length: of its model in tokens, after the first GetModel; 0 before.
        characters_per_token: maximum characters of one token of its model; 0 if unknown.
        served: the model, after the first GetModel.
        max_requests: that it accepts at a time; 0 if unknown.
        secure: whether it serves mutual TLS.
    """

    name: str
    address: str
    revision: str = ""
    context_length: int = 0
    characters_per_token: int = 0
    served: Served = Served()
    max_requests: int = 0
    secure: bool = False


def endpoints(slices: Iterable[Mapping[str, Any]]) -> frozenset[Endpoint]:
    """The endpoints that are not terminating, whether ready or not: their health is watched directly.

    A pod of a dual-stack Service is in slices of both families; it is one endpoint, with its IPv4 address.

    Args:
        slices: discovery.k8s.io/v1 EndpointSlice objects as JSON gives them.
    """
    pieces = list(slices)
    found = [(piece, endpoint) for piece in pieces for endpoint in _of_slice(piece)]
    four = {name for piece in pieces if piece.get("addressType") == "IPv4" for name in _pods(piece)}
    return frozenset(
        endpoint for piece, endpoint in found if piece["addressType"] == "IPv4" or endpoint.name not in four
    )


def static_endpoints(addresses: Iterable[str], *, secure: bool = False) -> frozenset[Endpoint]:
    """Endpoints by address, without a cluster; each is named after its address."""
    return frozenset(Endpoint(address, address, secure=secure) for address in addresses)


def _of_slice(piece: Mapping[str, Any]) -> Iterable[Endpoint]:
    port, secure = _port(piece.get("ports") or ())
    if port is None or piece.get("addressType") not in ("IPv4", "IPv6"):
        return
    for endpoint in piece.get("endpoints") or ():
        if not (endpoint.get("conditions") or {}).get("terminating"):
            yield _endpoint(endpoint, port, secure=secure)


def _pods(piece: Mapping[str, Any]) -> Iterable[str]:
    """Names of all pods of a slice, also of terminating ones."""
    return ((one.get("targetRef") or {}).get("name") or "" for one in piece.get("endpoints") or ())


def _port(ports: Iterable[Mapping[str, Any]]) -> tuple[int | None, bool]:
    """The port of gRPC by its name, or else the only one, and whether its name says that it serves TLS."""
    numbers = {port.get("name"): port.get("port") for port in ports}
    if names.SECURE_GRPC_PORT_NAME in numbers:
        return numbers[names.SECURE_GRPC_PORT_NAME], True
    only = next(iter(numbers.values())) if len(numbers) == 1 else None
    return numbers.get(names.GRPC_PORT_NAME, only), False


def _endpoint(endpoint: Mapping[str, Any], port: int, *, secure: bool) -> Endpoint:
    address = join(endpoint["addresses"][0], port)  # by the API, consumers use the first one
    name = (endpoint.get("targetRef") or {}).get("name")
    return Endpoint(name or address, address, secure=secure)
