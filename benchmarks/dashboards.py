"""Evaluates each panel and each alert of the chart in a real Prometheus that scrapes a running deployment.

    python -m benchmarks.dashboards --minutes 4

Starts a local cluster, installs the chart, serves the example with scaling under load, changes the deployment
(rollout) and deletes a worker. Prometheus runs in the cluster with the chart's alerts; its scrape
configuration follows from the PodMonitors and the ServiceMonitor that helm renders. Prints the number of
series and the range of values of each expression, and exits with 1 if one without an explanation has no data.
--record writes the data to a file, from which `python -m benchmarks.dashboard_pictures` draws the dashboards.
The first run builds Prometheus in about 5 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.commands import above_zero
from localcluster import Cluster, Forward
from localcluster.build import ensure
from localcluster.compilation import Program, Source

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts/moe-operator"
SOURCE = Source(
    Path(__file__).parent / "prometheus",
    (Program("github.com/prometheus/prometheus/cmd/prometheus", ("prometheus",)),),
    ("remove_all_sd", "enable_kubernetes_sd"),
)
OPERATOR, USERS, MONITORING, NAME = "moe-system", "users", "monitoring", "docs-moe"
SCRAPE_S, CLIENTS = 5, 6
SHARED = "The kernel maps each page of a process, and the file that it belongs to. " * 3
"""How all prompts begin, so that the prefix cache has something to find."""
MONITORS = ("metrics.enabled=true", "metrics.podMonitor.enabled=true", "metrics.serviceMonitor.enabled=true")
RBAC = "rbac.authorization.k8s.io"
Body = dict[str, Any]
EXPLAINED = {
    "Error of the forecast": "needs a forecast that came due",
    "MoEForecastInaccurate": "needs a forecast that came due",
    "MoEDeploymentStalled": "the condition exists only while it is True",
    "MoEOperatorDown": "absent(): nothing while the operator runs",
    "Failed requests by status": "nothing while no request fails",
    "MoERequestsFailing": "nothing while no request fails",
    "MoEHttpRequestsFailing": "nothing while no answer has 5xx",
    "Restarts of background loops per hour": "nothing while no loop fails",
    "MoEBackgroundLoopRestarts": "nothing while no loop fails",
    "MoEForecasterFailing": "nothing while no loop fails",
    "Reconciles": "no error while no reconcile fails",
    "MoEReconcileErrors": "nothing while no reconcile fails",
}
"""Why an expression may have no data in such a run."""


@dataclass(frozen=True)
class Expression:
    """What a panel or an alert evaluates."""

    place: str
    title: str
    text: str


@dataclass(frozen=True)
class Found:
    """Series with at least one number, and the least and the greatest of all numbers."""

    series: int
    least: float = math.nan
    greatest: float = math.nan


@dataclass(frozen=True)
class Recording:
    """What Prometheus had of each expression from `start` to `end`, in seconds since the epoch."""

    start: float
    end: float
    series: dict[str, list[Body]] = field(default_factory=dict)


def expressions(seconds: int) -> list[Expression]:
    """All panels with their variables filled in, then all alerts with `-` for each comparison.

    An alert has no series while all is well; the difference shows that both sides match.
    """
    found = []
    for path in sorted((CHART / "dashboards").glob("*.json")):
        found += [
            Expression(path.stem, panel["title"], filled(target["expr"], seconds))
            for panel in json.loads(path.read_text())["panels"]
            for target in panel.get("targets", ())
        ]
    for group in yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            text = re.sub(r" (==|<|>)(?= )", " -", rule["expr"])
            found.append(Expression("alerts", rule["alert"], text))
    return found


def filled(text: str, seconds: int) -> str:
    """An expression as Grafana sends it with "All" namespaces and deployments."""
    values = {"__rate_interval": f"{4 * SCRAPE_S}s", "__range": f"{seconds}s"}
    return re.sub(r"\$(\w+)", lambda name: values.get(name[1], ".*"), text)


def sanitized(label: str) -> str:
    return re.sub(r"\W", "_", label)


def scrape_configs(objects: list[Body]) -> list[Body]:
    """The configuration that the Prometheus Operator makes of PodMonitors and ServiceMonitors."""
    return [
        _scrape(body, number, endpoint)
        for body in objects
        if body["kind"] in {"PodMonitor", "ServiceMonitor"}
        for number, endpoint in enumerate(
            body["spec"].get("podMetricsEndpoints") or body["spec"]["endpoints"]
        )
    ]


def _scrape(monitor: Body, number: int, endpoint: Body) -> Body:
    is_pod, meta, spec = monitor["kind"] == "PodMonitor", monitor["metadata"], monitor["spec"]
    kind = "pod" if is_pod else "service"
    port = "pod_container_port_name" if is_pod else "endpoint_port_name"
    rules = [
        _keep(f"{kind}_label_{sanitized(label)}", value)
        for label, value in spec["selector"]["matchLabels"].items()
    ]
    rules.append(_keep(port, endpoint["port"]))
    job = f"{meta['namespace']}/{meta['name']}"
    rules += [_copy("namespace", "namespace"), _copy("pod_name", "pod")]
    rules.append(_copy("pod_container_name", "container"))
    rules += [
        _copy(f"pod_label_{sanitized(label)}", sanitized(label)) for label in spec.get("podTargetLabels", ())
    ]
    rules += [{"target_label": "endpoint", "replacement": endpoint["port"]}]
    rules += [{"target_label": "job", "replacement": job}] if is_pod else [_copy("service_name", "job")]
    names: Body = {} if is_pod else {"namespaces": {"names": [meta["namespace"]]}}
    return {
        "job_name": f"{kind}Monitor/{job}/{number}",
        "metrics_path": endpoint["path"],
        "kubernetes_sd_configs": [{"role": "pod" if is_pod else "endpoints", **names}],
        "relabel_configs": rules,
    }


def _keep(source: str, value: str) -> Body:
    return {"action": "keep", "source_labels": [f"__meta_kubernetes_{source}"], "regex": re.escape(value)}


def _copy(source: str, label: str) -> Body:
    return {"source_labels": [f"__meta_kubernetes_{source}"], "target_label": label}


def helm(cluster: Cluster, home: Path, *words: str) -> str:
    folders = {f"HELM_{name}_HOME": str(home / name) for name in ("CACHE", "CONFIG", "DATA")}
    environment = {**os.environ, **folders, "KUBECONFIG": str(cluster.kubeconfig)}
    line = [str(cluster.directory / "bin/helm"), *words, "--namespace", OPERATOR]
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def prometheus_objects(scrapes: list[Body]) -> list[Body]:
    """Prometheus as a Deployment that may list pods and endpoints everywhere."""
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": ["/etc/prometheus/alerts.yaml"],
        "scrape_configs": scrapes,
    }
    files = {"prometheus.yaml": yaml.safe_dump(config), "alerts.yaml": (CHART / "alerts.yaml").read_text()}
    meta = {"name": "prometheus", "namespace": MONITORING}
    rights = {
        "apiGroups": [""],
        "resources": ["pods", "services", "endpoints"],
        "verbs": ["get", "list", "watch"],
    }
    command = [str(ensure(["prometheus"], source=SOURCE)["prometheus"]), "--web.listen-address=:9090"]
    command += ["--config.file=/etc/prometheus/prometheus.yaml", "--storage.tsdb.path=/tmp/data"]
    container = {
        "name": "prometheus",
        "image": "busybox",
        "command": command,
        "ports": [{"name": "http", "containerPort": 9090}],
        "readinessProbe": {"httpGet": {"path": "/-/ready", "port": "http"}, "periodSeconds": 1},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/prometheus"}],
    }
    pod = {
        "serviceAccountName": "prometheus",
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": "prometheus"}}],
    }
    labels = {"app": "prometheus"}
    role = {"apiGroup": RBAC, "kind": "ClusterRole", "name": "prometheus"}
    subject = {"kind": "ServiceAccount", **meta}
    spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}
    return [
        _object("v1", "Namespace", {"name": MONITORING}),
        _object("v1", "ServiceAccount", meta),
        _object(f"{RBAC}/v1", "ClusterRole", {"name": "prometheus"}, rules=[rights]),
        _object(f"{RBAC}/v1", "ClusterRoleBinding", {"name": "prometheus"}, roleRef=role, subjects=[subject]),
        _object("v1", "ConfigMap", meta, data=files),
        _object("apps/v1", "Deployment", meta, spec=spec),
        _object("v1", "Service", meta, spec={"selector": labels, "ports": [{"name": "http", "port": 9090}]}),
    ]


def _object(version: str, kind: str, meta: Body, **content: Any) -> Body:
    return {"apiVersion": version, "kind": kind, "metadata": meta, **content}


def deployment() -> Body:
    body: Body = yaml.safe_load((ROOT / "examples/docs-moe.yaml").read_text())
    del body["spec"]["telemetry"], body["spec"]["replicas"]
    body["spec"]["scaling"] = {"minReplicas": 2, "maxReplicas": 3}
    body["spec"]["worker"] = {"resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}}
    return body


@contextlib.contextmanager
def load(address: str) -> Iterator[None]:
    """Clients that complete prompts; every fourth request repeats an earlier one."""
    done, numbers = threading.Event(), itertools.count()

    def run() -> None:
        while not done.is_set():
            number = next(numbers)
            wanted = {"model": NAME, "prompt": f"{SHARED} {number % 40}", "max_tokens": 24}
            body = {**wanted, "seed": number if number % 4 else 0, "temperature": 0.8}
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(
                f"http://{address}/v1/completions", json.dumps(body).encode(), headers
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                    answer.read()
            except (OSError, http.client.HTTPException):  # Prometheus counts it; panels show it
                done.wait(0.5)

    threads = [threading.Thread(target=run) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def disturb(cluster: Cluster, seconds: float) -> None:
    """A rollout after a third of the time, a lost worker after two thirds."""
    time.sleep(seconds / 3)
    changed = {"spec": {"worker": {"env": [{"name": "CHANGED", "value": "1"}]}}}
    cluster.kubectl("-n", USERS, "patch", "moedeployment", NAME, "--type=merge", "-p", json.dumps(changed))
    time.sleep(seconds / 3)
    workers = ("-l", "serving.moe-operator.dev/role=worker", "-o", "name")
    pod = cluster.kubectl("-n", USERS, "get", "pods", *workers).split()[0]
    cluster.kubectl("-n", USERS, "delete", pod, "--grace-period=0", "--force")
    time.sleep(seconds / 3)


def ask(address: str, path: str, **query: str | float) -> Any:
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"Prometheus refuses {url}: {error.read().decode()}") from error


def found_in(result: list[Body]) -> Found:
    values = [[float(value) for _, value in series["values"]] for series in result]
    finite = [[value for value in series if math.isfinite(value)] for series in values]
    numbers = [value for series in finite for value in series]
    return Found(sum(map(bool, finite)), min(numbers), max(numbers)) if numbers else Found(0)


def report(address: str, start: float, record: Path | None) -> int:
    """Prints a line for each expression; the number of those that lack data without an explanation."""
    end, unexplained, recorded = time.time(), 0, Recording(start, time.time())
    print(
        "| dashboard | panel or alert | series | least | greatest | |\n| --- | --- | --- | --- | --- | --- |"
    )
    for item in expressions(int(end - start)):
        answer = ask(address, "query_range", query=item.text, start=start, end=end, step=SCRAPE_S)
        recorded.series[item.text] = answer["result"]
        found = found_in(answer["result"])
        why = "" if found.series else EXPLAINED.get(item.title, f"**no data**: `{item.text}`")
        unexplained += why.startswith("**")
        figures = f"{found.series} | {found.least:.4g} | {found.greatest:.4g}"
        print(f"| {item.place} | {item.title} | {figures} | {why} |")
    if record is not None:
        record.write_text(json.dumps(dataclasses.asdict(recorded)))
    failed = "sum by (error_type) (max_over_time(moe_operator_reconcile_duration_seconds_count[1h]))"
    for series in ask(address, "query", query=failed)["result"]:
        print(f"reconciles: {series['metric'] or 'no error'}: {series['value'][1]}")
    for target in ask(address, "targets")["activeTargets"]:
        if target["health"] != "up":
            print(f"target {target['scrapeUrl']}: {target['lastError']}")
    for group in ask(address, "rules")["groups"]:
        for rule in group["rules"]:
            unexplained += rule["health"] != "ok"
            if rule["health"] != "ok" or rule["state"] != "inactive":
                print(f"{rule['name']}: {rule['health']}, {rule['state']} {rule.get('lastError', '')}")
    return unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--minutes", type=above_zero, default=4.0, help="of load")
    parser.add_argument("--record", type=Path, metavar="FILE", help="for benchmarks.dashboard_pictures")
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60
    with tempfile.TemporaryDirectory(prefix="moe-dashboards-") as scratch:
        cluster, home = Cluster(Path(scratch) / "cluster", extra_tools=["helm"]), Path(scratch) / "helm"
        cluster.up(detached=False)
        try:
            settings = [word for setting in MONITORS for word in ("--set", setting)]
            rendered = helm(cluster, home, "template", "moe-operator", str(CHART), *settings)
            scrapes = scrape_configs([body for body in yaml.safe_load_all(rendered) if body])
            values = ("--set", "metrics.enabled=true", "--set", "modelRoots={/mnt/models}")
            helm(
                cluster, home, "install", "moe-operator", str(CHART), "--create-namespace", "--wait", *values
            )
            cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(prometheus_objects(scrapes)))
            cluster.kubectl("create", "namespace", USERS)
            cluster.kubectl("-n", USERS, "apply", "-f", "-", input=yaml.safe_dump(deployment()))
            cluster.kubectl(
                "-n",
                USERS,
                "wait",
                "--for=condition=Ready",
                f"moedeployment/{NAME}",
                "--timeout=180s",
                timeout=200,
            )
            cluster.kubectl("-n", MONITORING, "rollout", "status", "deployment/prometheus", "--timeout=90s")
            start = time.time()
            with (
                Forward(cluster.directory, USERS, f"{NAME}-frontend", 8080) as frontend,
                Forward(cluster.directory, MONITORING, "prometheus", 9090) as prometheus,
            ):
                with load(frontend.address):
                    disturb(cluster, seconds)
                return min(report(prometheus.address, start, arguments.record), 1)
        finally:
            cluster.down()


if __name__ == "__main__":
    sys.exit(main())
