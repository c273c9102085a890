"""A real OpenTelemetry Collector on loopback, whose debug exporter writes to a file."""

import contextlib
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


class Collector:
    """`endpoint` takes OTLP over gRPC; `spans()` is what arrived."""

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

    def wait_for(self, condition, timeout_s=10, since=0):
        """Polls the received spans until the condition holds for them; gives them."""
        deadline = time.monotonic() + timeout_s
        while not condition(spans := self.spans(since)):
            if time.monotonic() > deadline:
                raise AssertionError(f"not received in {timeout_s} s; there is {spans}")
            time.sleep(0.02)
        return spans


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
