"""The example, served by the installed operator: how tests talk to it, watch it and break it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml

from localcluster import Cluster, Forward
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.operator.live import Live

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/docs-moe"


def eventually(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Polls until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


@dataclass(frozen=True)
class Served:
    """The example's MoEDeployment in a namespace of its own."""

    cluster: Cluster
    namespace: str

    def apply(self, name: str, uri: str, **spec: object) -> None:
        """Applies the example under another name, served from `uri`."""
        body = yaml.safe_load((ROOT / "examples/docs-moe.yaml").read_text())
        body["metadata"]["name"] = name
        body["spec"].pop("cache")  # every request is to reach a worker
        body["spec"] |= {"model": {"uri": uri}, **spec}
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump(body))

    def kubectl(self, *arguments: str, **options: str) -> str:
        """kubectl in the namespace."""
        return self.cluster.kubectl("-n", self.namespace, *arguments, **options)

    def ready(self, name: str = "docs-moe") -> dict[str, str]:
        """The Ready condition, or {}."""
        status = Live(self.cluster, self.namespace).get("moed", name).get("status", {})
        return next((c for c in status.get("conditions", []) if c["type"] == "Ready"), {})

    def pods(self, role: str) -> list[str]:
        """Names of the pods of a role, oldest name first."""
        selector = f"serving.moe-operator.dev/name=docs-moe,serving.moe-operator.dev/role={role}"
        found = Live(self.cluster, self.namespace).list("pods", selector)
        return sorted(pod["metadata"]["name"] for pod in found)

    @contextmanager
    def frontend(self) -> Iterator[InferenceServiceStub]:
        """A client's stub, connected through the frontend's Service."""
        with (
            Forward(self.cluster.directory, self.namespace, "docs-moe-frontend", 8000) as forward,
            grpc.insecure_channel(forward.address) as channel,
        ):
            yield InferenceServiceStub(channel)


def request(prompt: str, max_tokens: int) -> pb.GenerateRequest:
    """A greedy request."""
    return pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingParameters(max_tokens=max_tokens))


def kill_processes(environment: str) -> int:
    """Kills -9 every process whose environment holds the entry, e.g. HOSTNAME=x; returns how many."""
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            entries = (process / "environ").read_bytes().split(b"\0")
            if environment.encode() in entries and process.name != str(os.getpid()):
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or not ours
    return killed
