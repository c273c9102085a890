"""What services exist and who stands behind them: pure functions from API objects to backends and DNS
records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from localcluster.errors import ForwardError
from localcluster.layout import CLUSTER_DOMAIN

_SERVICE_LABEL = "kubernetes.io/service-name"
Object = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """A TCP address in the cluster's network."""

    host: str
    port: int


@dataclass(frozen=True)
class ServicePort:
    """One TCP port of a service.

    Attributes:
        service: "namespace/name".
        name: the port's name; empty for the only one.
        port: its number.
        address: the service's own address; None for a headless service.
    """

    service: str
    name: str
    port: int
    address: str | None

    @property
    def listen(self) -> Address | None:
        """Where the service is to be reached; None for a headless service."""
        return Address(self.address, self.port) if self.address else None


@dataclass(frozen=True)
class Catalog:
    """Everything at one moment: ports and selectors of pods by service, ready backends by (service, port
    name), DNS records by lower-case name.
    """

    ports: Mapping[str, tuple[ServicePort, ...]]
    selectors: Mapping[str, str]
    backends: Mapping[tuple[str, str], tuple[Address, ...]]
    records: Mapping[str, tuple[IPv4Address, ...]]

    def listeners(self) -> dict[ServicePort, Address]:
        """Which service ports to listen for, and where."""
        every = (port for ports in self.ports.values() for port in ports)
        return {port: port.listen for port in every if port.listen is not None}

    def behind(self, port: ServicePort) -> tuple[Address, ...]:
        """The ready backends of a service port."""
        return self.backends.get((port.service, port.name), ())

    def lacks(self, port: ServicePort) -> str:
        """Why connections to a service port are reset, and who knows more."""
        namespace, _, _ = port.service.partition("/")
        selector = self.selectors.get(port.service)
        pods = f"kubectl get pods -n {namespace}" + (f" -l {selector}" if selector else "")
        if port.service not in self.ports:
            return f"service {port.service} was deleted, so connections are reset; end this forward"
        if self.behind(port):
            return f"no ready pod of service {port.service} accepts connections; read their logs (`{pods}`)"
        return (
            f"service {port.service} has no ready pod for port {port.port}, so connections are reset until "
            f"it has one; `{pods}` shows its pods"
        )

    def find(self, namespace: str, service: str, port: str) -> ServicePort:
        """A service's port by name or number; raises ForwardError saying what there is instead."""
        key = f"{namespace}/{service}"
        if key not in self.ports:
            known = ", ".join(sorted(s for s in self.ports if s.startswith(f"{namespace}/"))) or "none"
            raise ForwardError(f"there is no service {key}; services in namespace {namespace}: {known}")
        for candidate in self.ports[key]:
            if port in (candidate.name, str(candidate.port)):
                return candidate
        known = ", ".join(f"{p.port} {p.name}".strip() for p in self.ports[key]) or "none"
        raise ForwardError(f"service {key} has no TCP port {port}; its ports: {known}")


def build(services: Mapping[str, Object], slices: Mapping[str, Object]) -> Catalog:
    """The catalog of these Services and EndpointSlices, each by "namespace/name"."""
    return Catalog(
        ports={key: tuple(_ports(key, service)) for key, service in services.items()},
        selectors={key: _selector(service) for key, service in services.items()},
        backends=_backends(slices.values()),
        records=_records(services, slices.values()),
    )


def _selector(service: Object) -> str:
    return ",".join(f"{name}={value}" for name, value in (service["spec"].get("selector") or {}).items())


def _ports(key: str, service: Object) -> Iterator[ServicePort]:
    spec = service["spec"]
    address = spec.get("clusterIP")
    for port in spec.get("ports", []):
        if port.get("protocol", "TCP") == "TCP":
            yield ServicePort(
                key,
                port.get("name", ""),
                port["port"],
                address if address not in (None, "", "None") else None,
            )


def _owner(endpoint_slice: Object) -> str:
    """The service ("namespace/name") that an EndpointSlice of IPv4 addresses belongs to; empty for others."""
    metadata = endpoint_slice["metadata"]
    name = metadata.get("labels", {}).get(_SERVICE_LABEL)
    return f"{metadata['namespace']}/{name}" if name and endpoint_slice["addressType"] == "IPv4" else ""


def _ready(endpoint_slice: Object) -> Iterator[Object]:
    """Endpoints that take traffic. No condition means ready (EndpointConditions in the API reference)."""
    for endpoint in endpoint_slice.get("endpoints") or []:
        if endpoint.get("conditions", {}).get("ready") is not False:
            yield endpoint


def _backends(slices: Iterable[Object]) -> dict[tuple[str, str], tuple[Address, ...]]:
    found: dict[tuple[str, str], tuple[Address, ...]] = {}
    for item in slices:
        owner = _owner(item)
        if not owner:
            continue
        for port in item.get("ports") or []:
            key = (owner, port.get("name") or "")
            addresses = tuple(
                Address(e["addresses"][0], port["port"]) for e in _ready(item) if port.get("port")
            )
            found[key] = found.get(key, ()) + addresses
    return found


def _records(services: Mapping[str, Object], slices: Iterable[Object]) -> dict[str, tuple[IPv4Address, ...]]:
    """A records by the rules of github.com/kubernetes/dns, docs/specification.md, sections 2.3 and 2.4."""
    records: dict[str, list[IPv4Address]] = {}
    for key, service in services.items():
        address = service["spec"].get("clusterIP")
        if address not in (None, "", "None"):
            records[_domain(key)] = [IPv4Address(address)]
        else:
            records.setdefault(_domain(key), [])
    for item in slices:
        owner = _owner(item)
        if owner not in services or services[owner]["spec"].get("clusterIP") != "None":
            continue
        for endpoint in _ready(item):
            address = IPv4Address(endpoint["addresses"][0])
            records[_domain(owner)].append(address)
            if endpoint.get("hostname"):
                records.setdefault(f"{endpoint['hostname']}.{_domain(owner)}", []).append(address)
    return {name: tuple(dict.fromkeys(addresses)) for name, addresses in records.items()}


def _domain(key: str) -> str:
    namespace, _, name = key.partition("/")
    return f"{name}.{namespace}.svc.{CLUSTER_DOMAIN}".lower()
