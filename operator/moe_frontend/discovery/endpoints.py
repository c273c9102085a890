"""Which leaders there are, read out of EndpointSlices. Pure."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final

PORT_NAME: Final = "grpc"


@dataclasses.dataclass(frozen=True, order=True)
class Served:
    """What a worker says of its model, beyond what routing needs.

    Attributes:
        name: that clients ask for.
        context_length: tokens of prompt and text together.
        samples: whether the checkpoint brings a temperature above 0 for requests that set none.
        template: how a conversation becomes a prompt, in Jinja; "" where there is no telling.
        special_tokens: names of the template's variables, and what they hold.
    """

    name: str = ""
    context_length: int = 0
    samples: bool = False
    template: str = ""
    special_tokens: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, order=True)
class Endpoint:
    """A leader that may take requests.

    Attributes:
        name: of the pod; of the address where there is no pod.
        address: ``HOST:PORT``, with an IPv6 host in brackets.
        revision: of what it serves, once it was asked.
        context_length: of its model in tokens, once it was asked; 0 before.
        characters_per_token: that one token of its model stands for at most; 0: not known.
        served: the model, once it was asked.
    """

    name: str
    address: str
    revision: str = ""
    context_length: int = 0
    characters_per_token: int = 0
    served: Served = Served()


def endpoints(slices: Iterable[Mapping[str, Any]]) -> frozenset[Endpoint]:
    """The endpoints that are not going away, whether ready or not: that is asked of themselves.

    Args:
        slices: discovery.k8s.io/v1 EndpointSlice objects as JSON gives them.
    """
    return frozenset(endpoint for piece in slices for endpoint in _of_slice(piece))


def static_endpoints(addresses: Iterable[str]) -> frozenset[Endpoint]:
    """Endpoints given by address rather than by a cluster; each is named after its address."""
    return frozenset(Endpoint(address, address) for address in addresses)


def _of_slice(piece: Mapping[str, Any]) -> Iterable[Endpoint]:
    port = _port(piece.get("ports") or ())
    if port is None or piece.get("addressType") not in ("IPv4", "IPv6"):
        return
    for endpoint in piece.get("endpoints") or ():
        if not (endpoint.get("conditions") or {}).get("terminating"):
            yield _endpoint(endpoint, port)


def _port(ports: Iterable[Mapping[str, Any]]) -> int | None:
    """The port named ``grpc``, or else the only one."""
    numbers = {port.get("name"): port.get("port") for port in ports}
    only = next(iter(numbers.values())) if len(numbers) == 1 else None
    return numbers.get(PORT_NAME, only)


def _endpoint(endpoint: Mapping[str, Any], port: int) -> Endpoint:
    host = endpoint["addresses"][0]  # the API says: consumers use the first one
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    name = (endpoint.get("targetRef") or {}).get("name")
    return Endpoint(name or address, address)
