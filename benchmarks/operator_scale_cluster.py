"""The cluster of benchmarks.operator_scale: a real API server, and simulated nodes and controllers.

It creates a pod for each StatefulSet, reports it as Ready once its gate is open, counts the replicas of
Deployments, and responds for workers and frontends.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import urllib3

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_operator.resources import names
from tests.frontend.apiserver import ApiServer

OPERATOR_TOKEN, OPERATOR_USER = "only-for-the-operator", "operator"
ADDRESS = "127.77.0.1"
"""The address of all pods; one stand-in responds there."""
NAMESPACES = [f"scale-{number}" for number in range(10)]
CUSTOM = f"/apis/{names.API_VERSION}"
Body = dict[str, Any]


class Server(ApiServer):  # type: ignore[misc]
    """The API server, with an audit log of the operator's requests."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.audit_log = directory / "audit.log"
        with (directory / "tokens.csv").open("a") as tokens:
            tokens.write(f"{OPERATOR_TOKEN},{OPERATOR_USER},{OPERATOR_USER},system:masters\n")
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived", "ResponseStarted"],
            "rules": [{"level": "Metadata", "users": [OPERATOR_USER]}, {"level": "None"}],
        }
        (directory / "policy.json").write_text(json.dumps(policy))

    def _spawn(self, name: str, *arguments: str) -> None:
        if name == "kube-apiserver":
            policy = f"--audit-policy-file={self.directory / 'policy.json'}"
            arguments += (policy, f"--audit-log-path={self.audit_log}", "--audit-log-maxsize=4000")
        super()._spawn(name, *arguments)

    def requests(self) -> int:
        """Lines of the audit log so far."""
        with self.audit_log.open("rb") as log:
            return sum(1 for _ in log)

    def asked(self, since: int, until: int) -> collections.Counter[str]:
        """The operator's requests between two lines, as "verb resource"; watches and peering aside."""
        counted: collections.Counter[str] = collections.Counter()
        with self.audit_log.open() as log:
            for number, line in enumerate(log):
                if since <= number < until:
                    event = json.loads(line)
                    what = event.get("objectRef", {})
                    if event["verb"] != "watch" and what.get("resource") != "clusterkopfpeerings":
                        name = "/".join(filter(None, (what.get("resource"), what.get("subresource"))))
                        counted[f"{event['verb']} {name}"] += 1
        return counted


class Api:
    """The API server for this program, as the administrator."""

    def __init__(self, port: int, token: str) -> None:
        urllib3.disable_warnings()
        self._url = f"https://127.0.0.1:{port}"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._pool = urllib3.PoolManager(maxsize=40, cert_reqs="CERT_NONE")

    def __call__(
        self, method: str, path: str, body: Body | None = None, kind: str = "application/json"
    ) -> Body:
        headers = {**self._headers, "Content-Type": kind}
        answer = self._pool.request(method, self._url + path, body=json.dumps(body), headers=headers)
        if answer.status >= 300:  # not always JSON: a path that is not served yet has a plain text
            raise RuntimeError(f"{method} {path}: {answer.data.decode(errors='replace')[:500]}")
        found: Body = json.loads(answer.data)
        return found

    def follow(self, path: str) -> Iterator[tuple[str, Body]]:
        """Existing objects as added, then events; restarts when the server ends a watch.

        The server ends watches that are too slow, as this program sometimes is.
        """
        while True:
            found = self("GET", path)
            for item in found["items"]:
                yield "ADDED", {**item, "kind": found["kind"].removesuffix("List")}
            for event in self._watch(f"{path}&resourceVersion={found['metadata']['resourceVersion']}"):
                if event["type"] == "ERROR":
                    break
                yield event["type"], event["object"]

    def _watch(self, path: str) -> Iterator[Body]:
        answer = self._pool.request(
            "GET", f"{self._url}{path}&watch=true", headers=self._headers, preload_content=False, timeout=3600
        )
        rest = b""
        for chunk in answer.stream(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)


class Simulated:
    """Simulates the controllers, the kubelets, and the workers and frontends in their pods."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._threads = ThreadPoolExecutor(16)
        self._made: set[str] = set()
        """Owners that have their pod."""
        self._routed: set[str] = set()
        """Workers' pods whose readiness gate was opened; they are Ready."""
        self.unrouted: set[str] = set()
        """Workers' pods whose readiness gate is closed."""
        self.failure: BaseException | None = None
        self.seen: dict[tuple[str, str, int], float] = {}
        """When each (namespace, frontend, replicas) was seen."""
        for path, handle in (
            ("/apis/apps/v1/statefulsets?", self._stateful_set),
            ("/apis/apps/v1/deployments?", self._deployment),
            (f"/api/v1/pods?labelSelector={names.LABEL_ROLE}={names.ROLE_WORKER}", self._worker_pod),
        ):
            threading.Thread(target=self._follow, args=(path, handle), daemon=True).start()

    @property
    def ready(self) -> int:
        """Workers' pods that are Ready."""
        return len(self._routed)

    def seen_since(self, namespace: str, frontend: str, replicas: int) -> float:
        """When this edit, or a later one of the same deployment that overtook it, was seen; or infinity."""
        seen = list(self.seen.items())
        same = [(count, at) for (where, what, count), at in seen if (where, what) == (namespace, frontend)]
        later = (at for count, at in same if count >= replicas)
        return min(later, default=math.inf)

    def _follow(self, path: str, handle: Callable[[str, Body], None]) -> None:
        with contextlib.suppress(urllib3.exceptions.HTTPError):  # the API server ends with the benchmark
            for kind, body in self._api.follow(path):
                handle(kind, body)

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            try:
                work(*arguments)
            except Exception as error:  # noqa: BLE001 - the main thread ends the benchmark with it
                self.failure = error

        self._threads.submit(guarded)

    def _stateful_set(self, kind: str, body: Body) -> None:
        if kind != "DELETED" and body["metadata"]["name"] not in self._made:
            self._made.add(body["metadata"]["name"])
            name = f"{body['metadata']['name']}-0"
            self.unrouted.add(name)
            self._do(self._make_pod, body, name, {"ContainersReady": "True", "Ready": "False"})

    def _worker_pod(self, kind: str, body: Body) -> None:
        """The kubelet: a pod is Ready when its containers are and its gate is open."""
        found = {condition["type"]: condition["status"] for condition in body["status"].get("conditions", ())}
        name, routed = body["metadata"]["name"], found.get(names.ROUTED) == "True"
        if kind != "DELETED" and routed and found.get("Ready") == "False" and name not in self._routed:
            self.unrouted.discard(name)
            self._routed.add(name)
            self._do(self._set_conditions, body["metadata"], {"Ready": "True"})

    def _make_pod(self, owner: Body, name: str, conditions: dict[str, str]) -> None:
        metadata, template = owner["metadata"], owner["spec"]["template"]
        reference = {"apiVersion": "apps/v1", "kind": owner["kind"], "controller": True}
        reference |= {"name": metadata["name"], "uid": metadata["uid"]}
        own = {"name": name, "labels": template["metadata"]["labels"], "ownerReferences": [reference]}
        spec = {**template["spec"], "nodeName": "simulated"}
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods"
        made = self._api("POST", path, {"metadata": own, "spec": spec})
        running = {"image": "i", "imageID": "i", "ready": True, "restartCount": 0, "state": {"running": {}}}
        status = {
            "phase": "Running",
            "podIP": ADDRESS,
            "podIPs": [{"ip": ADDRESS}],
            "containerStatuses": [{"name": spec["containers"][0]["name"], **running}],
        }
        self._set_conditions(made["metadata"], conditions, status)

    def _set_conditions(self, pod: Body, conditions: dict[str, str], others: Body | None = None) -> None:
        path = f"/api/v1/namespaces/{pod['namespace']}/pods/{pod['name']}/status"
        listed = [
            {"type": kind, "status": status, "reason": "" if status == "True" else "ReadinessGatesNotReady"}
            for kind, status in conditions.items()
        ]
        body = {"status": {**(others or {}), "conditions": listed}}
        self._api("PATCH", path, body, "application/strategic-merge-patch+json")

    def _deployment(self, kind: str, body: Body) -> None:
        metadata, replicas = body["metadata"], body["spec"]["replicas"]
        self.seen.setdefault((metadata["namespace"], metadata["name"], replicas), time.monotonic())
        if kind != "DELETED" and metadata["name"] not in self._made:
            self._made.add(metadata["name"])
            self._do(
                self._make_pod, body, f"{metadata['name']}-0", {"ContainersReady": "True", "Ready": "True"}
            )
        if kind == "DELETED" or body.get("status", {}).get("observedGeneration") == metadata["generation"]:
            return
        self._do(self._count_replicas, body)

    def _count_replicas(self, body: Body) -> None:
        metadata = body["metadata"]
        count = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas"), body["spec"]["replicas"])
        status = {**count, "observedGeneration": metadata["generation"]}
        path = f"/apis/apps/v1/namespaces/{metadata['namespace']}/deployments/{metadata['name']}/status"
        self._api("PATCH", path, {"status": status}, "application/merge-patch+json")


class Worker(inference_pb2_grpc.InferenceServiceServicer):
    """The worker API for the operator."""

    def GetModel(  # noqa: N802
        self,
        request: inference_pb2.GetModelRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> inference_pb2.Model:
        """Any model."""
        return inference_pb2.Model(
            name="stand-in", architecture="deepseek_v3", format="w4a8", context_length=4096
        )


class Frontend(frontend_pb2_grpc.FrontendServiceServicer):
    """The frontend API for the operator. This frontend routes to every worker at once."""

    def __init__(self, simulated: Simulated) -> None:
        self._simulated = simulated

    def GetRoutes(  # noqa: N802
        self,
        request: frontend_pb2.GetRoutesRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> frontend_pb2.Routes:
        """Only routes that the operator does not know yet."""
        address = f"{ADDRESS}:{names.GRPC_PORT}"
        waiting = list(self._simulated.unrouted)
        return frontend_pb2.Routes(
            routes=[frontend_pb2.Route(name=name, address=address) for name in waiting]
        )


def start_standins(simulated: Simulated) -> grpc.Server:
    """Listens as every simulated pod."""
    server = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Worker(), server)  # type: ignore[abstract]
    frontend_pb2_grpc.add_FrontendServiceServicer_to_server(Frontend(simulated), server)  # type: ignore[abstract]
    server.add_insecure_port(f"{ADDRESS}:{names.GRPC_PORT}")
    server.start()
    return server
