"""A real OpenTelemetry Collector on loopback, whose debug exporter writes to a file."""

import contextlib
import dataclasses
import re
import socket
import subprocess
import sys
import time

from localcluster import build, traces
from localcluster.progress import Reporter

CONFIG = """
receivers: {{otlp: {{protocols: {{grpc: {{endpoint: "127.0.0.1:{port}"}}}}}}}}
exporters: {{debug: {{verbosity: detailed}}}}
service:
  telemetry: {{metrics: {{level: none}}}}
  pipelines:
    traces: {{receivers: [otlp], exporters: [debug]}}
    metrics: {{receivers: [otlp], exporters: [debug]}}
"""


ATTRIBUTE = re.compile(r"     -> (?P<key>\S+): \w+\((?P<value>.*)\)$")


@dataclasses.dataclass
class Point:
    """One series of a metric as it was received last; `value` of a sum or gauge, the rest of a histogram."""

    unit: str
    kind: str
    attributes: dict[str, str] = dataclasses.field(default_factory=dict)
    value: float | None = None
    count: int = 0
    sum: float = 0.0
    bounds: list[float] = dataclasses.field(default_factory=list)
    buckets: list[int] = dataclasses.field(default_factory=list)


class Collector:
    """`endpoint` takes OTLP over gRPC; `spans()` and `metrics()` are what arrived.

    run: only metrics of resources with this text are given, since those of an earlier process may come late.
    """

    run = ""

    def __init__(self, port, log):
        self.endpoint = f"http://127.0.0.1:{port}"
        self.log = log

    def text(self):
        return self.log.read_text()

    def size(self):
        return self.log.stat().st_size

    def spans(self, since=0):
        """Those of batches that are finished (the file may be in the middle of one), from an offset on."""
        with self.log.open("rb") as log:
            log.seek(since)
            return traces.parse(log.read().decode().rpartition("\n\t{")[0])

    def wait_for(self, condition, timeout_s=60, since=0):
        """Polls the received spans until the condition holds for them; gives them."""
        deadline = time.monotonic() + timeout_s
        while not condition(spans := self.spans(since)):
            if time.monotonic() > deadline:
                raise AssertionError(f"not received in {timeout_s} s; there is {spans}")
            time.sleep(0.02)
        return spans

    def metrics(self, since=0):
        """The newest points of each metric, by name, from an offset on."""
        with self.log.open("rb") as log:
            log.seek(since)
            text = log.read().decode().rpartition("\n\t{")[0]
        series = {}
        for block in self._metric_blocks(text):
            name, points = parse_metric(block)
            for point in points:
                series[name, tuple(sorted(point.attributes.items()))] = point
        found = {}
        for (name, _), point in series.items():
            found.setdefault(name, []).append(point)
        return found

    def _metric_blocks(self, text):
        for resource in text.split("ResourceMetrics #"):
            head, *blocks = re.split(r"^Metric #\d+\n", resource, flags=re.MULTILINE)
            if self.run in head:
                yield from blocks

    def wait_for_metrics(self, condition, timeout_s=60, since=0):
        """Polls the received metrics until the condition holds for them; gives them."""
        deadline = time.monotonic() + timeout_s
        while not condition(found := self.metrics(since)):
            if time.monotonic() > deadline:
                raise AssertionError(f"not received in {timeout_s} s; there is {found}")
            time.sleep(0.05)
        return found


def parse_metric(block):
    """Name and points of one metric as the debug exporter prints it."""
    head, *bodies = re.split(r"^\w+DataPoints #\d+\n", block, flags=re.MULTILINE)
    fields = dict(line.strip()[3:].split(": ", 1) for line in head.splitlines() if ": " in line)
    points = []
    for body in bodies:
        point = Point(fields.get("Unit", ""), fields["DataType"])
        for line in body.splitlines():
            read_line(point, line)
        points.append(point)
    return fields["Name"], points


def read_line(point, line):
    key, _, value = line.partition(": ")
    if match := ATTRIBUTE.match(line):
        point.attributes[match["key"]] = match["value"]
    elif key == "Value":
        point.value = float(value)
    elif key == "Count":
        point.count = int(value)
    elif key == "Sum":
        point.sum = float(value)
    elif key.startswith("ExplicitBounds #"):
        point.bounds.append(float(value))
    elif key.startswith("Buckets #"):
        point.buckets.append(int(value))


@contextlib.contextmanager
def running_collector(directory):
    with Reporter(sys.stderr) as reporter:
        executable = build.ensure(["otelcol"], reporter.show)["otelcol"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config, log = directory / "otelcol.yaml", directory / "otelcol.log"
    config.write_text(CONFIG.format(port=port))
    with log.open("w") as output:
        process = subprocess.Popen([executable, "--config", config], stdout=output, stderr=output)
    collector = Collector(port, log)
    deadline = time.monotonic() + 20
    while "Everything is ready" not in collector.text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(collector.text())
        time.sleep(0.02)
    try:
        yield collector
    finally:
        process.terminate()
        process.wait()
