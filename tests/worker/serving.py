"""A real `moe-worker serve` process for tests."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_api import transport
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc

DEADLINE_S = 150
COMMAND = (sys.executable, "-c", "from moe_worker.main import main; main()")
NOTHING = inference_pb2.GenerateRequest()


class Worker:
    """Starts on a free port; the port is read from its log, which is kept in `lines`."""

    def __init__(self, checkpoint, *flags, environment=None, **process):
        self.command = [*COMMAND, "serve", "--model", str(checkpoint), "--served-name", "tiny"]
        self.command += ["--listen", "127.0.0.1:0", "--threads", "1", *flags]
        self.process_options = {"env": os.environ | (environment or {}), **process}
        self.lines = []
        self._fresh = queue.SimpleQueue()

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            **self.process_options,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.port = int(self.wait_line("listening on port ").split("port ")[1].split(",")[0])
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}", options=transport.CLIENT_OPTIONS)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.load = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()
        self.channel.close()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            self._fresh.put(line)
        self._fresh.put(None)

    def wait_line(self, text):
        """The next log line that holds `text`."""
        end = time.monotonic() + DEADLINE_S
        while (line := self._fresh.get(timeout=end - time.monotonic())) is not None:
            if text in line:
                return line
        raise AssertionError(f"the worker ended without saying {text!r}:\n" + "\n".join(self.lines))

    def status(self, service=""):
        return self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S).status

    def wait_ready(self):
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=DEADLINE_S)
        for update in watch:
            if update.status == health_pb2.HealthCheckResponse.SERVING:
                watch.cancel()
                return

    def generate(self, prompt="hello", timeout=DEADLINE_S, metadata=None, **sampling):
        """Starts a call; the responses are an iterator."""
        request = inference_pb2.GenerateRequest(
            prompt=prompt, sampling=inference_pb2.SamplingParameters(**sampling)
        )
        return self.inference.Generate(request, timeout=timeout, metadata=metadata)

    def wait_load(self, **expected):
        """Polls GetLoad until the fields have these values."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            load = self.load.GetLoad(worker_pb2.GetLoadRequest(), timeout=DEADLINE_S)
            if all(getattr(load, name) == value for name, value in expected.items()):
                return load
        raise AssertionError(f"the load did not become {expected}; it is {load}")

    def engine_pid(self):
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return int(Path(children).read_text().split()[0])

    @contextlib.contextmanager
    def halted(self):
        """The engine computes nothing meanwhile: no stream ends, however slow the test is."""
        engine = self.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(engine, signal.SIGCONT)

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)


def endless_loading(folder):
    """Environment in which no engine process gets as far as its first import, as if its model were huge."""
    code = "import sys, time\ntime.sleep(3600 * ('moe_worker.service.engine_process' in sys.orig_argv))\n"
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def refused(call):
    """The error that a call ends with."""
    with contextlib.suppress(StopIteration):
        try:
            for _ in call:
                pass
        except grpc.RpcError as error:
            return error
    raise AssertionError("the call should have failed")


def wait_gone(pid):
    """Waits until no process (zombies count as gone) has this id."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
    raise AssertionError(f"process {pid} is still there")
