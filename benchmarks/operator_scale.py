"""Measures the operator with many deployments: a real etcd and API server, the real operator process.

    python -m benchmarks.operator_scale --deployments 100 --replicas 20

There are no nodes and no controllers: operator_scale_cluster *simulates* them. The audit log gives the
operator's requests to the API server.

Edits change spec.frontend.replicas. An edit counts as applied when a watch shows the frontend's Deployment
changed.
`--operator CHECKOUT` runs the operator of another checkout, for a comparison.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from rich.progress import Progress

from benchmarks.commands import above_zero, positive
from benchmarks.operator_scale_cluster import (
    CUSTOM,
    NAMESPACES,
    OPERATOR_TOKEN,
    Api,
    Server,
    Simulated,
    start_standins,
)
from moe_operator.resources import names
from tests.operator.outside import Operator, kubeconfig

ROOT = Path(__file__).parents[1]
_WIDTH = 66


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
    parser.add_argument("--deployments", type=positive, default=100)
    parser.add_argument("--replicas", type=positive, default=20, help="of each deployment, one pod each")
    parser.add_argument("--rate", type=above_zero, default=20, help="edits a second")
    parser.add_argument("--seconds", type=above_zero, default=30, help="of edits")
    parser.add_argument("--resync", type=positive, default=60, help="resync interval in seconds")
    parser.add_argument("--limit", type=above_zero, default=500, help="seconds that one phase may take")
    parser.add_argument("--operator", type=Path, default=ROOT, metavar="CHECKOUT", help="whose operator")
    parser.add_argument("--keep", type=Path, help="keep logs in this directory")
    arguments = parser.parse_args()
    if arguments.rate * arguments.seconds < 2:
        parser.error("--rate times --seconds makes fewer than two edits; raise one of them")
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
