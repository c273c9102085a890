"""Measures the operator with many deployments: a real etcd and API server, the real operator process.

    python -m benchmarks.operator_scale --deployments 100 --replicas 20

There are no nodes and no controllers: this program *simulates* them. It creates a pod for each StatefulSet,
reports it as Ready once its gate is open, counts the replicas of Deployments, and responds for workers and
frontends. The audit log gives the operator's requests to the API server.

Edits change spec.frontend.replicas. An edit counts as applied when a watch shows the frontend's Deployment
changed.
`--operator CHECKOUT` runs the operator of another checkout, for a comparison.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import urllib3
import yaml
from rich.progress import Progress

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_operator.resources import names
from tests.frontend.apiserver import ApiServer
from tests.operator.outside import Operator, kubeconfig

ROOT = Path(__file__).parents[1]
OPERATOR_TOKEN, OPERATOR_USER = "only-for-the-operator", "operator"
ADDRESS = "127.77.0.1"
"""The address of all pods; one stand-in responds there."""
_WIDTH = 66
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


def install(api: Api) -> None:
    """CRDs and namespaces."""
    for path in (ROOT / "crds").glob("*.yaml"):
        for body in yaml.safe_load_all(path.read_text()):
            api("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body)
    for name in NAMESPACES:
        api("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    deadline = time.monotonic() + 30
    while True:
        try:
            api("GET", f"{CUSTOM}/{names.PLURAL}?limit=1")
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def place(number: int) -> str:
    """Path of one deployment."""
    return f"{CUSTOM}/namespaces/{NAMESPACES[number % len(NAMESPACES)]}/{names.PLURAL}"


def make_deployments(api: Api, count: int, replicas: int) -> None:
    """Deployments as users create them."""

    def make(number: int) -> None:
        # The stand-ins of all pods share an address, and the figures are of reconciles, not of handshakes.
        plain = {"transport": {"mode": "Plaintext"}}
        spec = {"model": {"uri": "file:///mnt/models/docs-moe"}, "replicas": replicas, **plain}
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": f"d{number}"},
            "spec": spec,
        }
        api("POST", place(number), body)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(make, range(count)))


def wait_until_ready(api: Api, simulated: Simulated, count: int, replicas: int, limit: float) -> float:
    """Seconds until every deployment is Ready."""
    started = time.monotonic()
    with Progress(transient=True) as progress:
        task = progress.add_task("pods, simulated", total=count * replicas)
        while True:
            progress.update(task, completed=simulated.ready)
            if simulated.failure is not None:
                raise simulated.failure
            if simulated.ready >= count * replicas:
                items = api("GET", f"{CUSTOM}/{names.PLURAL}")["items"]
                conditions = [c for item in items for c in item.get("status", {}).get("conditions", [])]
                if sum(c["type"] == "Ready" and c["status"] == "True" for c in conditions) == count:
                    return time.monotonic() - started
            if time.monotonic() - started > limit:
                raise RuntimeError(f"not Ready within {limit:.0f} s; {simulated.ready} pods are")
            time.sleep(1)


def edit(api: Api, simulated: Simulated, count: int, rate: float, seconds: float) -> list[float]:
    """Edits at a constant rate; sorted seconds from the response to each edit until it was applied."""
    order = [
        n
        for _ in range(math.ceil(rate * seconds / count))
        for n in random.Random(0).sample(range(count), count)
    ]
    made: dict[tuple[str, str, int], float] = {}
    lock, turns = threading.Lock(), collections.Counter[int]()

    def one(number: int) -> None:
        turns[number] += 1
        replicas = 1 + turns[number]
        change = {"spec": {"frontend": {"replicas": replicas}}}
        api("PATCH", f"{place(number)}/d{number}", change, "application/merge-patch+json")
        with lock:
            made[NAMESPACES[number % len(NAMESPACES)], f"d{number}-frontend", replicas] = time.monotonic()

    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        for turn, number in enumerate(order[: int(rate * seconds)]):
            time.sleep(max(0.0, started + turn / rate - time.monotonic()))
            threads.submit(one, number)
    deadline = time.monotonic() + 120
    while any(simulated.seen_since(*key) == math.inf for key in made) and time.monotonic() < deadline:
        time.sleep(0.5)
    return sorted(simulated.seen_since(*key) - at for key, at in made.items())


def percentile(values: list[float], share: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


class Rows(dict[str, str]):
    """The table, printed line by line, because a run takes minutes."""

    def __setitem__(self, name: str, value: str) -> None:
        super().__setitem__(name, value)
        print(f"  {name:<{_WIDTH}}  {value}", flush=True)


def measure(arguments: argparse.Namespace, directory: Path) -> None:
    """One run; prints the table."""
    count, replicas = arguments.deployments, arguments.replicas
    server = Server(directory)
    rows = Rows()
    operator = None
    try:
        server.start_etcd()
        server.start()
        api = Api(server.port, "only-for-this-test")
        install(api)
        simulated = Simulated(api)
        _standins = start_standins(simulated)
        config = kubeconfig(directory, server.port, OPERATOR_TOKEN)
        make_deployments(api, count, replicas)
        operator = Operator(
            directory, config, arguments.operator, resync_seconds="3600", model_roots="/mnt/models"
        )
        took = wait_until_ready(api, simulated, count, replicas, arguments.limit)
        rows["from no object to all Ready"] = f"{took:.0f} s"
        operator.idle_after(arguments.limit)
        rows["peak memory while creating"] = f"{operator.memory_mib('VmHWM'):.0f} MiB"

        before = server.requests()
        latencies = edit(api, simulated, count, arguments.rate, arguments.seconds)
        time.sleep(3)
        asked = server.asked(before, server.requests())
        rows["edits"] = f"{len(latencies)} at {arguments.rate:g}/s"
        for name, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0)):
            rows[f"edit to applied, {name}"] = f"{percentile(latencies, share) * 1e3:.0f} ms"
        rows["requests for each edit"] = per(asked, len(latencies))
        operator.stop()

        before, resync = server.requests(), arguments.resync
        operator = Operator(
            directory, config, arguments.operator, resync_seconds=str(resync), model_roots="/mnt/models"
        )
        rows["restart: seconds until all are reconciled"] = f"{operator.idle_after(arguments.limit):.0f} s"
        asked = server.asked(before, server.requests())
        writes = sum(n for what, n in asked.items() if not what.startswith(("get", "list")))
        rows["restart: writes"] = f"{writes}"
        rows["restart: requests"] = per(asked, 1)
        before, cpu, start = server.requests(), operator.cpu_seconds(), time.monotonic()
        time.sleep(resync)
        asked = server.asked(before, server.requests())
        rows["resync of all without a change: requests a deployment"] = per(asked, count)
        load = (operator.cpu_seconds() - cpu) / (time.monotonic() - start)
        rows[f"resync of all in {resync} s: CPU"] = f"{load:.2f} cores"
        rows["memory after a restart, now / highest"] = (
            f"{operator.memory_mib('VmRSS'):.0f} / {operator.memory_mib('VmHWM'):.0f} MiB"
        )
    finally:
        if operator is not None and operator.process.poll() is None:
            operator.stop()
        for name in list(server.processes):
            server.kill(name)


def per(asked: collections.Counter[str], count: int) -> str:
    """Requests for each of `count`, in total and by kind."""
    kinds = ", ".join(f"{n / count:.2f} {what}" for what, n in asked.most_common(6))
    return f"{asked.total() / count:.2f}" + (f" ({kinds})" if kinds else "")


def main() -> None:
    """Runs it once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deployments", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=20, help="of each deployment, one pod each")
    parser.add_argument("--rate", type=float, default=20, help="edits a second")
    parser.add_argument("--seconds", type=float, default=30, help="of edits")
    parser.add_argument("--resync", type=int, default=60, help="resync interval in seconds")
    parser.add_argument("--limit", type=float, default=500, help="seconds that one phase may take")
    parser.add_argument("--operator", type=Path, default=ROOT, metavar="CHECKOUT", help="whose operator")
    parser.add_argument("--keep", type=Path, help="keep logs in this directory")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        total = arguments.deployments * arguments.replicas
        print(f"{arguments.deployments} deployments, {total} pods (simulated); load {os.getloadavg()[0]:.1f}")
        measure(arguments, directory)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
