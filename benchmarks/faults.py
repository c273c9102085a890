"""Injects faults into a served model under load, and prints what clients lose.

    python -m benchmarks.faults [--times 2] [--clients 6] [--tokens 60] [--only "worker killed"]

Starts a local cluster with the operator and two replicas of examples/docs-moe (float32, on the CPU). CLIENTS
threads repeatedly stream TOKENS greedy tokens each; every response is compared with one from before the first
fault. The columns:

    requests   that ended between the fault and the moment when everything was well again
    failed     of these, requests that ended with an error
    lost       tokens missing, or repeated, in the others: by the count that usage gives
    changed    answers with other tokens than before (float32 sums depend on the batch, so a near tie may fall
               the other way, with or without a fault; integer kernels have none)
    pause s    the longest that any client waited for its next token
    unready s  from the fault until the condition Ready was True and stayed so; 0: it never was False
    whole s    from the fault until nothing was left to do: every replica there, and of the latest revision

A fault that ends or replaces processes counts as over only when they were seen to have ended or changed.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import yaml

from benchmarks.commands import positive
from localcluster import Cluster, Forward
from localcluster.errors import CommandError
from moe_api import transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub

ROOT = Path(__file__).parents[1]
NAME = "docs-moe"
PROMPTS = ("The kernel maps a page", "To install the package", "A transaction begins", "The scheduler")
OPERATOR = "operator"
SETTLE_S = 10.0
STALL_S = 5
PATIENCE_S = 600.0
AWAY_S = 20.0


def main() -> None:
    args = arguments()
    with served() as site:
        expected = {prompt: site.ask(prompt, args.tokens) for prompt in PROMPTS}
        rows = []
        for name, (fault, victim) in FAULTS.items():
            if args.only in (None, name):
                found = [inject(site, fault, victim, expected, args.clients) for _ in range(args.times)]
                rows.append(Row.of(name, found))
                print(rows[-1], file=sys.stderr)
    print(Row.header())
    for row in rows:
        print(row)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=positive, default=2, help="how often each fault is injected")
    parser.add_argument("--clients", type=positive, default=6)
    parser.add_argument("--tokens", type=positive, default=60)
    parser.add_argument("--only", choices=FAULTS, help="inject this one alone")
    return parser.parse_args()


@dataclass
class Outcome:
    """The effect of one fault."""

    requests: int = 0
    failed: int = 0
    lost: int = 0
    changed: int = 0
    pause_s: float = 0.0
    unready_s: float = 0.0
    whole_s: float = 0.0
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """All injections of one fault."""

    fault: str
    times: int
    sums: tuple[int, int, int, int]
    pause_s: float
    unready_s: float
    whole_s: float

    @classmethod
    def of(cls, fault: str, found: list[Outcome]) -> "Row":
        sums = [(one.requests, one.failed, one.lost, one.changed) for one in found]
        for one in found:
            for reason in sorted(set(one.reasons)):
                print(f"  {fault}: {reason}", file=sys.stderr)
        total = tuple(map(sum, zip(*sums, strict=True)))
        return cls(
            fault,
            len(found),
            (total[0], total[1], total[2], total[3]),
            max(one.pause_s for one in found),
            max(one.unready_s for one in found),
            max(one.whole_s for one in found),
        )

    @staticmethod
    def header() -> str:
        return (
            "| fault | injected | requests | failed | lost | changed | pause s | unready s | whole s |\n"
            + "|---" * 9
            + "|"
        )

    def __str__(self) -> str:
        counts = " | ".join(map(str, self.sums))
        times = " | ".join(f"{seconds:.1f}" for seconds in (self.pause_s, self.unready_s, self.whole_s))
        return f"| {self.fault} | {self.times} | {counts} | {times} |"


@dataclass(frozen=True)
class Site:
    """The served example."""

    cluster: Cluster
    namespace: str
    address: str

    def kubectl(self, *words: str, text: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.namespace, *words, input=text)

    def state(self) -> tuple[bool, bool]:
        """Whether Ready is True, and whether it is True for the latest spec with no rollout in progress."""
        body = json.loads(self.kubectl("get", "moed", NAME, "-o", "json"))
        found = {one["type"]: one for one in body.get("status", {}).get("conditions", ())}
        ready = found.get("Ready", {}).get("status") == "True"
        current = found.get("Ready", {}).get("observedGeneration") == body["metadata"]["generation"]
        return ready, ready and current and found["Progressing"]["reason"] == "Complete"

    def is_whole(self) -> bool:
        return self.state()[1]

    def pods(self, role: str) -> list[str]:
        pods = self._pods(role)
        return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def runs(self, role: str) -> dict[str, int]:
        """UID of each pod of a role, with the restarts of its container."""
        statuses = {pod["metadata"]["uid"]: pod["status"] for pod in self._pods(role)}
        return {
            uid: sum(container["restartCount"] for container in status.get("containerStatuses", ()))
            for uid, status in statuses.items()
        }

    def _pods(self, role: str) -> list[dict[str, Any]]:
        if role == OPERATOR:
            found = self.cluster.kubectl("get", "pods", "-n", "moe-system", "-o", "json")
        else:
            selector = f"serving.moe-operator.dev/name={NAME},serving.moe-operator.dev/role={role}"
            found = self.kubectl("get", "pods", "-l", selector, "-o", "json")
        return list(json.loads(found)["items"])

    def ask(self, prompt: str, tokens: int) -> list[int]:
        with grpc.insecure_channel(self.address) as channel:
            stub = InferenceServiceStub(channel)
            return [t for part in stub.Generate(request(prompt, tokens), timeout=120) for t in part.tokens]


def request(prompt: str, tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=prompt, sampling=pb.SamplingParameters(max_tokens=tokens, ignore_eos=True)
    )


@contextmanager
def served() -> Iterator[Site]:
    """A cluster with the operator and the example, Ready."""
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(Path(directory) / "cluster")
        cluster.up(detached=False)
        try:
            cluster.kubectl("apply", "-f", str(ROOT / "charts/install.yaml"))
            cluster.kubectl("create", "namespace", "faults")
            site = Site(cluster, "faults", "")
            site.kubectl("apply", "-f", "-", text=yaml.safe_dump(manifest()))
            wait(site.is_whole, "the example is Ready")
            with Forward(cluster.directory, "faults", f"{NAME}-frontend", 8000) as forward:
                yield replace(site, address=forward.address)
        finally:
            cluster.down()


def manifest() -> dict[str, object]:
    body = yaml.safe_load((ROOT / "examples/docs-moe.yaml").read_text())
    body["spec"].pop("telemetry")
    body["spec"].pop("cache")  # every request is to reach a worker
    body["spec"]["worker"]["env"] = [{"name": "MOE_WORKER_STALL_TIMEOUT", "value": str(STALL_S)}]
    body["spec"]["worker"]["terminationGracePeriodSeconds"] = 10
    return dict(body)


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not quietly(condition):
        if time.monotonic() > deadline:
            raise SystemExit(f"error: not within {PATIENCE_S:.0f} s: {what}")
        time.sleep(0.2)


def quietly(condition: Callable[[], bool]) -> bool:
    """False if the API server does not respond."""
    try:
        return condition()
    except Exception:  # noqa: BLE001 - kubectl fails in many ways while the API server is away
        return False


def inject(
    site: Site,
    fault: Callable[[Site], None],
    victim: str | None,
    expected: dict[str, list[int]],
    clients: int,
) -> Outcome:
    """One fault under load, until full recovery.

    victim: role of the pods of which one ends or is replaced; None where none is.
    """
    outcome, stop, lock = Outcome(), threading.Event(), threading.Lock()
    threads = [
        threading.Thread(target=stream, args=(site, number, expected, outcome, stop, lock))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    before = site.runs(victim) if victim else {}
    started = time.monotonic()
    fault(site)
    until_well(site, outcome, started, lambda: victim is None or site.runs(victim) != before)
    stop.set()
    for thread in threads:
        thread.join()
    return outcome


def until_well(site: Site, outcome: Outcome, started: float, has_hit: Callable[[], bool]) -> None:
    """Waits until the fault has taken effect and the deployment has been healthy for some seconds since."""
    since, hit = time.monotonic(), False
    while time.monotonic() - since < SETTLE_S:
        ready, whole = looked(site)
        hit = hit or quietly(has_hit)
        if not (whole and hit):
            since = time.monotonic()
        outcome.unready_s = outcome.unready_s if ready else time.monotonic() - started
        outcome.whole_s = outcome.whole_s if whole else time.monotonic() - started
        if time.monotonic() - started > PATIENCE_S:
            raise SystemExit("error: the deployment does not get Ready again")
        time.sleep(0.2)


def looked(site: Site) -> tuple[bool, bool]:
    """The result of `Site.state`; while the API server does not respond, Ready cannot be seen as False."""
    try:
        return site.state()
    except CommandError:
        return True, False


def stream(
    site: Site,
    number: int,
    expected: dict[str, list[int]],
    outcome: Outcome,
    stop: threading.Event,
    lock: threading.Lock,
) -> None:
    """One client, until it is stopped."""
    with grpc.insecure_channel(site.address, options=transport.CLIENT_OPTIONS) as channel:
        stub = InferenceServiceStub(channel)
        while not stop.is_set():
            prompt = PROMPTS[number % len(PROMPTS)]
            tokens: list[int] = []
            pauses, before = [0.0], time.monotonic()
            failure, claimed = None, 0
            try:
                for part in stub.Generate(request(prompt, len(expected[prompt])), timeout=120):
                    tokens += part.tokens
                    claimed = part.usage.completion_tokens or claimed
                    pauses.append(time.monotonic() - before)
                    before = time.monotonic()
            except grpc.RpcError as error:
                failure = f"{error.code().name}: {error.details()}"
            with lock:
                outcome.requests += 1
                outcome.failed += failure is not None
                outcome.reasons += [failure] if failure else []
                outcome.lost += 0 if failure else abs(claimed - len(tokens))
                outcome.changed += failure is None and tokens != expected[prompt]
                outcome.pause_s = max(outcome.pause_s, *pauses)
            if failure:
                time.sleep(0.2)


def signal_processes(environment: str, words: str, number: int) -> None:
    """Sends a signal to the processes that have the variable (NAME=VALUE) and the words in their command."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            entries = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if environment.encode() in entries and words in command:
                os.kill(int(process.name), number)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or not ours


def worker_killed(site: Site) -> None:
    signal_processes(f"HOSTNAME={site.pods('worker')[0]}", "", signal.SIGKILL)


def engine_killed(site: Site) -> None:
    signal_processes(f"HOSTNAME={site.pods('worker')[0]}", "engine_process", signal.SIGKILL)


def engine_hangs(site: Site) -> None:
    signal_processes(f"HOSTNAME={site.pods('worker')[0]}", "engine_process", signal.SIGSTOP)


def pod_deleted(site: Site) -> None:
    site.kubectl("delete", "pod", site.pods("worker")[0], "--wait=false")


def pod_evicted(site: Site) -> None:
    pod = site.pods("worker")[0]
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": site.namespace},
    }
    path = f"/api/v1/namespaces/{site.namespace}/pods/{pod}/eviction"
    site.kubectl("create", "--raw", path, "-f", "-", text=json.dumps(body))


def scaled_down_and_up(site: Site) -> None:
    for replicas in (1, 2):
        site.kubectl("scale", f"moed/{NAME}", f"--replicas={replicas}")
        time.sleep(3.0)


def rolled_out(site: Site) -> None:
    body = json.loads(site.kubectl("get", "moed", NAME, "-o", "json"))
    size = body["spec"]["engine"]["maxBatchSize"] + 1
    patch = json.dumps({"spec": {"engine": {"maxBatchSize": size}}})
    site.kubectl("patch", "moed", NAME, "--type=merge", "-p", patch)


def operator_killed(site: Site) -> None:
    signal_processes(f"HOSTNAME={site.pods(OPERATOR)[0]}", "", signal.SIGKILL)


def frontend_killed(site: Site) -> None:
    signal_processes(f"HOSTNAME={site.pods('frontend')[0]}", "", signal.SIGKILL)


def api_server_away(site: Site) -> None:
    """Stopped, as if overloaded or cut off; its active requests time out."""
    with site.cluster.paused("kube-apiserver"):
        time.sleep(AWAY_S)


def node_silent(site: Site) -> None:
    """The kubelet hangs until Kubernetes calls the node NotReady; containers run on."""
    with site.cluster.paused("kubelet"):
        wait(lambda: not site.state()[0], "the node is missed")


FAULTS: dict[str, tuple[Callable[[Site], None], str | None]] = {
    "worker killed": (worker_killed, "worker"),
    "engine killed": (engine_killed, "worker"),
    "engine hangs": (engine_hangs, "worker"),
    "pod deleted": (pod_deleted, "worker"),
    "pod evicted": (pod_evicted, "worker"),
    "scaled down and up": (scaled_down_and_up, "worker"),
    "new revision": (rolled_out, "worker"),
    "operator killed": (operator_killed, OPERATOR),
    "API server away": (api_server_away, None),
    "node does not report": (node_silent, None),
    "frontend killed": (frontend_killed, "frontend"),
}

if __name__ == "__main__":
    main()
