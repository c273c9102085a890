"""Asks the replicas of a deployment for the load of their experts, for `moe status NAME`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

import grpc

from moe_api import mutual, rich_status
from moe_api.tls import KeyPair
from moe_api.visible import one_line
from moe_api.worker.v1 import worker_pb2
from moe_cli.expert_rows import figures
from moe_cli.experts import Reachable, as_worker, ask
from moe_client.endpoint import Endpoint, Options
from moe_operator.resources import names

TIMEOUT_S: Final = 2.0
"""For all replicas together."""
_ASKED_MOST: Final = 16
_LONGEST_DETAIL: Final = 120
_MUTUAL: Final = "with mutual TLS, add --tls-folder (docs/security.md)"
_PLAINTEXT: Final = "without mutual TLS, leave out --tls-folder (MOE_TLS_FOLDER)"
_REMEDY: Final = (
    "where pods cannot be reached, as from outside most clusters, run `kubectl port-forward{namespace} "
    "pod/{worker} 8000` and add --endpoint 127.0.0.1:8000"
)
_REMEDY_OF_AN_ADDRESS: Final = "--endpoint has to be a worker's gRPC port, or one that forwards there"


@dataclass(frozen=True)
class _Secured:
    """A worker that asks for a certificate."""

    address: str
    own: KeyPair

    def channel(self, options: Options) -> grpc.Channel:
        """A gRPC channel over mutual TLS."""
        named = (*options, *mutual.expecting(mutual.WORKER))
        return grpc.secure_channel(self.address, mutual.channel_credentials(self.own), options=named)


def used(
    pods: Iterable[Mapping[str, Any]],
    given: Endpoint,
    own: KeyPair | None = None,
    timeout_s: float = TIMEOUT_S,
    namespace: str = "",
) -> dict[str, Any] | None:
    """The use of experts in each replica that is ready; None if no replica has statistics.

    Args:
        pods: of a report (moe_operator.statuspage.report).
        given: how to reach workers; with an address, only the worker there is asked.
        own: a certificate of the namespace, for workers with mutual TLS if `given` has none.
        timeout_s: for all of them together.
        namespace: of the pods, for the command that forwards a port; empty: the kubeconfig's own.

    Raises:
        CommandError: the files of `given` are no certificates.
    """
    ready = {str(given): _with(own, given)} if given.address else leaders(pods, given, own)
    asked = dict(islice(ready.items(), _ASKED_MOST))
    answers = zip(asked, ask(list(asked.values()), timeout_s), strict=True)
    replicas = [said for worker, answer in answers if (said := _replica(worker, answer)) is not None]
    if replicas and all("problem" in said for said in replicas):
        option = namespace and f" -n {namespace}"
        forward = _REMEDY.format(namespace=option, worker=next(iter(asked)))
        remedy = _REMEDY_OF_AN_ADDRESS if given.address else forward
        of_tls = _PLAINTEXT if given.proof is not None else _MUTUAL if own is None else ""
        replicas[-1]["problem"] += "".join(f"; {one}" for one in (remedy, of_tls) if one)
    return {"ready": len(ready), "replicas": replicas} if replicas else None


def leaders(
    pods: Iterable[Mapping[str, Any]], given: Endpoint, own: KeyPair | None = None
) -> dict[str, Reachable]:
    """Where the first worker of each replica that is ready listens, by the name of its pod."""
    return {
        pod["name"]: _with(own if pod["mutualTls"] else None, _at(pod["address"], given))
        for pod in pods
        if pod["role"] == names.ROLE_WORKER and pod["ready"] and not pod["leaving"]
        if pod["address"] and not pod["rank"]
    }


def _with(own: KeyPair | None, endpoint: Endpoint) -> Reachable:
    """The worker at an endpoint; options of the command line come before the namespace's certificate."""
    return as_worker(endpoint) if own is None or endpoint.tls else _Secured(endpoint.address, own)


def _at(ip: str, given: Endpoint) -> Endpoint:
    """TLS of workers is mutual, so without a certificate of the caller the connection is in plaintext."""
    address = f"{f'[{ip}]' if ':' in ip else ip}:{names.GRPC_PORT}"
    if given.proof is None:
        return Endpoint(address)
    return as_worker(replace(given, address=address))


def _replica(worker: str, answer: worker_pb2.ExpertLoad | grpc.RpcError) -> dict[str, Any] | None:
    if isinstance(answer, worker_pb2.ExpertLoad):
        found = figures(answer)
        return None if found is None else {"worker": worker, **found}
    status = rich_status.from_error(answer)
    code = rich_status.status_code(status)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return None
    detail = one_line(status.message, _LONGEST_DETAIL)
    return {"worker": worker, "problem": f"worker did not report its experts: {code.name} ({detail})"}
