"""The complete path from an empty machine to a traced request: `make demo` (KEEP=1 keeps everything running;
MESH=2x2 serves the example by a replica of two stages of two workers).

A real Kubernetes on this machine, the operator installed as a user would, a MoEDeployment applied, text
streamed through its frontend, and the trace of that request as the OpenTelemetry Collector received it; then
the same request again, which comes from the output cache of the frontend.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape

from localcluster import Cluster, Forward, traces
from localcluster.errors import LocalClusterError
from localcluster.progress import Reporter

ROOT = Path(__file__).resolve().parent.parent
NAME = "docs-moe"
PROMPT = "The PostgreSQL query planner"
OPENAI = f"""import openai, sys
client = openai.OpenAI(base_url=sys.argv[1], api_key="unused")
for chunk in client.completions.create(model="{NAME}", prompt="The kernel", max_tokens=24, stream=True):
    print(chunk.choices[0].text, end="", flush=True)"""
MESH = re.compile("[1-9][0-9]?x[1-9][0-9]?")
WORKER_PORT = 8443  # of workers with mutual TLS
READY_WITHIN_S = 300.0
TRACE_WITHIN_S = 30.0

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class DemoError(Exception):
    """A step of the demo failed; the message names the step and where to read more."""


def main() -> int:
    """Runs the demonstration; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(
        "make demo", "make demo [KEEP=1] [MESH=2x2]", __doc__, formatter_class=form
    ).parse_args()
    try:
        check(os.environ)
    except DemoError as error:  # nothing has started, so nothing is to be stopped
        return _fail(error)
    cluster, keep = Cluster(), os.environ.get("KEEP") == "1"
    started = time.monotonic()
    found_running = cluster.is_running()
    made: list[str] = []
    try:
        run(cluster, made, found_running=found_running, keep=keep)
        console.print(f"\n[bold]Done[/] in {time.monotonic() - started:.0f} s.")
    except (DemoError, LocalClusterError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        console.print("\nstopped")
        return 130
    finally:
        if not keep:
            clean_up(cluster, made, found_running=found_running)
    what_next(cluster, kept=keep)
    return 0


def _fail(error: Exception) -> int:
    console.print(f"\n[red]error:[/] {escape(str(error))}")
    return 1


def run(cluster: Cluster, made: list[str], *, found_running: bool, keep: bool) -> None:
    """Runs and times every step; adds to `made` the manifests whose objects did not exist before."""
    if not found_running:
        title = "start a Kubernetes on this machine (etcd, API server, scheduler, kubelet)"
        with step(title), Reporter(sys.stderr) as reporter:
            # Unless the cluster is to stay, it is tied to this process: not even SIGKILL leaves it running.
            cluster.up(on_build=reporter.show, detached=keep)
    with step("install the CRDs and the operator: kubectl apply -f charts/install.yaml"):
        apply(cluster, "charts/install.yaml", made)
        apply(cluster, "examples/collector.yaml", made)
        cluster.kubectl("-n", "moe-system", "rollout", "status", "deployment/moe-operator", "--timeout=120s")
        cluster.kubectl("-n", "observability", "rollout", "status", "deployment/otelcol", "--timeout=60s")
    mesh = os.environ.get("MESH", "")
    manifest = gang(cluster.directory, mesh) if mesh else f"examples/{NAME}.yaml"
    with step(f"kubectl apply -f {manifest}"):
        apply(cluster, manifest, made)
        wait_until_ready(cluster)
    trace_id = generate(cluster)
    console.print("\n[bold]The request as the OpenTelemetry Collector received it[/]")
    show_trace(cluster, trace_id, {"moe", "moe-frontend", "moe-worker"})
    trace_id = generate(cluster)
    console.print("\n[bold]The same request again: the frontend answered it from its output cache[/]")
    show_trace(cluster, trace_id, {"moe", "moe-frontend"})
    complete(cluster)
    console.print("\n[bold]$ kubectl get moed[/]")
    console.print(cluster.kubectl("get", "moed"), end="", markup=False)
    if mesh:
        show_status(cluster)


def check(variables: Mapping[str, str]) -> None:
    """Raises DemoError for a value of KEEP or MESH that has no meaning."""
    keep, mesh = variables.get("KEEP", ""), variables.get("MESH", "")
    if keep not in ("", "0", "1"):
        raise DemoError(f"KEEP is {keep!r}; write KEEP=1 to keep the cluster running, or leave it out")
    if mesh and not MESH.fullmatch(mesh):
        raise DemoError(f"MESH is {mesh!r}; write PIPELINExEXPERT, as 2x2")


def gang(folder: Path, mesh: str) -> str:
    """Writes the example with one replica of PIPELINExEXPERT workers; returns the manifest's path."""
    pipeline, expert = map(int, mesh.split("x"))
    body = yaml.safe_load((ROOT / f"examples/{NAME}.yaml").read_text())
    parallelism = {"pipeline": pipeline, "expert": expert}
    worker = {"resources": {"requests": {"cpu": "100m", "memory": "256Mi"}}}
    body["spec"] |= {"replicas": 1, "parallelism": parallelism, "worker": worker}
    path = folder / f"{NAME}-{mesh}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return str(path)


def apply(cluster: Cluster, manifest: str, made: list[str]) -> None:
    """Applies a manifest, and adds it to `made` if all its objects are new."""
    lines = cluster.kubectl("apply", "-f", str(ROOT / manifest)).splitlines()
    if all(line.endswith(" created") for line in lines):
        made.append(manifest)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Prints what is done, and how long it took."""
    console.print(f"[bold cyan]==>[/] {title}")
    started = time.monotonic()
    yield
    console.print(f"    [dim]{time.monotonic() - started:.1f} s[/]")


def wait_until_ready(cluster: Cluster) -> None:
    """Prints each new reason of the Ready condition until it is true."""
    deadline = time.monotonic() + READY_WITHIN_S
    shown = ""
    while time.monotonic() < deadline:
        status = json.loads(cluster.kubectl("get", "moed", NAME, "-o", "json")).get("status", {})
        ready = next((c for c in status.get("conditions", []) if c["type"] == "Ready"), None)
        line = f"{ready['reason']}: {ready['message']}" if ready else "waiting for the operator"
        if line != shown:
            console.print(f"    {line}", markup=False)
            shown = line
        if ready and ready["status"] == "True":
            return
        time.sleep(0.5)
    raise DemoError(
        f"{NAME} was not Ready within {READY_WITHIN_S:.0f} s ({shown}); "
        "run with KEEP=1 and look at `.local/bin/kubectl --kubeconfig .local/kubeconfig describe moed`"
    )


def generate(cluster: Cluster) -> str:
    """Streams an answer through the frontend; returns the request's trace id."""
    with (
        Forward(cluster.directory, "default", f"{NAME}-frontend", 8000) as frontend,
        Forward(cluster.directory, "observability", "otelcol", 4317) as collector,
    ):
        console.print(f'\n[bold]$ moe generate --endpoint {frontend.address} "{PROMPT}" --stats[/]')
        command = [str(Path(sys.executable).with_name("moe")), "generate", "--endpoint", frontend.address]
        command += [PROMPT, "--max-tokens", "96", "--temperature", "0.7", "--seed", "1", "--stats"]
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.address}"}
        console.print(PROMPT, style="bold", end="")
        result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    console.print(f"\n[dim]{escape(result.stderr.strip())}[/]")
    found = re.search(r"trace: ([0-9a-f]{32})", result.stderr)
    if result.returncode or not found:
        raise DemoError(f"`moe generate` ended with code {result.returncode}: {result.stderr.strip()}")
    return found[1]


def complete(cluster: Cluster) -> None:
    """Has curl and OpenAI's client answered by the frontend's HTTP port."""
    with Forward(cluster.directory, "default", f"{NAME}-frontend", "http") as frontend:
        base = f"http://{frontend.address}/v1"
        fields = {"model": NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        curl = ["curl", "--silent", "--show-error", f"{base}/completions"]
        curl += ["-H", "Content-Type: application/json", "-d", json.dumps(fields)]
        if shutil.which("curl") is not None:
            console.print(f"\n[bold]$ {escape(shlex.join(curl))}[/]")
            show(curl)
        console.print(f"\n[bold]$ python -c {escape(shlex.quote(OPENAI))} {base}[/]")
        show([sys.executable, "-c", OPENAI, base])


def show_status(cluster: Cluster) -> None:
    """Prints the state of the deployment. Pods are not reachable from here, so a worker is asked for its
    experts through a forward.
    """
    with Forward(cluster.directory, "default", f"{NAME}-workers", WORKER_PORT) as worker:
        options = ["status", NAME, "--endpoint", worker.address]
        console.print(f"\n[bold]$ moe {shlex.join(options)}[/]")
        show([str(Path(sys.executable).with_name("moe")), *options], cluster)


def show(command: list[str], cluster: Cluster | None = None) -> None:
    """Runs a command, for a cluster if there is one, and prints what it says."""
    environment = os.environ | {"COLUMNS": str(console.width)}
    environment |= {} if cluster is None else {"KUBECONFIG": str(cluster.directory / "kubeconfig")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DemoError(f"{command[0]} ended with code {result.returncode}: {result.stderr.strip()}")
    console.print(result.stdout.strip(), markup=False)


def show_trace(cluster: Cluster, trace_id: str, services: set[str]) -> None:
    """Prints the trace as a tree once the collector has all of it (processes send every second).

    services: processes that take part in it.
    """
    deadline = time.monotonic() + TRACE_WITHIN_S
    while time.monotonic() < deadline:
        log = cluster.kubectl("-n", "observability", "logs", "deployment/otelcol")
        for trace in traces.trees(traces.parse(log)):
            there = {span.service for span in trace}
            if trace[0].trace_id == trace_id and traces.is_complete(trace) and services <= there:
                console.print(traces.render(trace))
                return
        time.sleep(0.5)
    raise DemoError(f"the trace {trace_id} did not arrive whole within {TRACE_WITHIN_S:.0f} s")


def clean_up(cluster: Cluster, made: list[str], *, found_running: bool) -> None:
    """Stops the cluster, or deletes what the demo created in a cluster that ran before.

    The CRDs are deleted only if the demo created them, because every MoEDeployment is deleted with them.
    """
    if not found_running:
        cluster.down()
        console.print("The cluster is stopped; nothing is left running.")
        return
    for manifest in reversed(made):
        cluster.kubectl("delete", "--ignore-not-found", "-f", str(ROOT / manifest))


def what_next(cluster: Cluster, *, kept: bool) -> None:
    """Says what to try."""
    here = cluster.directory.relative_to(ROOT)
    if not kept:
        mesh = f" MESH={os.environ['MESH']}" if os.environ.get("MESH") else ""
        console.print(f"\nTo keep it running and look around: [bold]make demo KEEP=1{mesh}[/]")
        return
    console.print(
        f"""
Running. Try:
  export KUBECONFIG=$PWD/{here}/kubeconfig PATH=$PWD/{here}/bin:$PWD/.venv/bin:$PATH
  kubectl get moed,pods                              who is there
  moe status {NAME}                                what the operator thinks
  python -m localcluster forward default/{NAME}-workers:{WORKER_PORT} --local-port {WORKER_PORT} &
  moe status {NAME} --endpoint 127.0.0.1:{WORKER_PORT}      the same, and the use of experts
  kubectl scale moed {NAME} --replicas=3           one more replica
  kubectl delete pod {NAME}-0-0                    a worker dies, and comes back
  python -m localcluster forward default/{NAME}-frontend:8080 --local-port 8080 &
  curl http://127.0.0.1:8080/v1/models               OpenAI's API
  python -m localcluster forward default/{NAME}-frontend:8000 --local-port 8000 &
  moe generate --endpoint 127.0.0.1:8000 "DESCRIPTION" --stats
  kubectl explain moedeployment.spec                 every field
  make down                                          stop everything""",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
