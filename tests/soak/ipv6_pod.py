"""Runs the processes of tests/soak/test_ipv6.py in one pod's network, and prints how they respond."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from moe_api import mutual
from moe_operator.render import frontend, worker
from moe_operator.resources import names
from tests.operator.worlds import deployment
from tests.pki import Authority, mount
from tests.soak.gang import SECRET
from tests.worker.serving import COMMAND

ADDRESS = "fd00::5"
PYTHON = Path(sys.executable)
JSON = {"Content-Type": "application/json"}
DEADLINE_S = 120.0
FRONTEND, HTTP, HEALTH = 8001, 8083, 8080
METRICS = {"frontend": 9463, "worker": 9464, "second worker": 9465}


def listening(command: list[str], port: int) -> str:
    """The address after --listen in a rendered command, with another port: the processes share one pod."""
    address = command[command.index("--listen") + 1]
    return f"{address.rpartition(':')[0]}:{port}"


def liveness() -> str:
    """Where the operator of the chart serves health, in a pod named pod."""
    manifest = (Path(__file__).parents[2] / "charts/install.yaml").read_text()
    (option,) = re.findall("--liveness=.*", manifest)
    return option.replace("$(POD_ID)", "pod")


def answered(url: str, body: object = None) -> tuple[int, bytes]:
    """Status and body of the response, as soon as there is one."""
    data = None if body is None else json.dumps(body).encode()
    ends = time.monotonic() + DEADLINE_S
    while True:
        request = urllib.request.Request(url, data, JSON)  # noqa: S310 - of this test
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                return response.status, response.read()
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.5)


@contextlib.contextmanager
def running(*command: object, **environment: str) -> Iterator[None]:
    process = subprocess.Popen(list(map(str, command)), env=os.environ | environment, stdout=sys.stderr)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def rank(checkpoint: str, number: int, metrics: int) -> contextlib.AbstractContextManager[None]:
    """A worker of a mesh 1x2, whose leader is known by its name."""
    at = listening(worker.command(deployment()), names.GRPC_PORT + 10 * number)
    command = [*COMMAND, "serve", "--model", checkpoint, "--served-name", "tiny", "--listen", at]
    command += ["--device", "cpu", "--dtype", "float32", "--metrics-port", metrics]
    command += ["--mesh", "1x2", "--mesh-leader", f"pod:{names.MESH_PORT}", "--mesh-rank", number]
    command += ["--tls", Path(checkpoint) / names.ROLE_WORKER]
    return running(*command, **SECRET)


def main(checkpoint: str) -> None:
    authority, folder = Authority(), Path(checkpoint)
    mount(folder / names.ROLE_WORKER, authority.pair(mutual.WORKER))
    mount(folder / names.ROLE_FRONTEND, authority.pair(mutual.FRONTEND))
    at = listening(frontend.command(deployment()), FRONTEND)
    http = f"{at.rpartition(':')[0]}:{HTTP}"
    serve = [PYTHON.with_name("moe-frontend"), "--listen", at, "--http", http]
    serve += ["--static", f"[{ADDRESS}]:{names.GRPC_PORT}", "--metrics-port", METRICS["frontend"]]
    serve += ["--internal-tls", folder / names.ROLE_FRONTEND]
    # The operator itself serves health when it has found an API server; kopf serves it for the operator.
    handlers = folder / "handlers.py"
    handlers.write_text("")
    watch = [PYTHON, "-m", "kopf", "run", "--standalone", "--all-namespaces", liveness(), handlers]
    config = folder / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": f"https://[{ADDRESS}]:6443"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "c"}}
    user = {"name": "c", "user": {"token": "t"}}
    known = {"clusters": [cluster], "contexts": [context], "users": [user], "current-context": "c"}
    config.write_text(json.dumps(known))
    with contextlib.ExitStack() as stack:
        stack.enter_context(rank(checkpoint, 0, METRICS["worker"]))
        stack.enter_context(rank(checkpoint, 1, METRICS["second worker"]))
        stack.enter_context(running(*serve))
        stack.enter_context(running(*watch, KUBECONFIG=str(config)))
        asked = {"model": "tiny", "prompt": "the quick", "max_tokens": 8}
        status, body = answered(f"http://[{ADDRESS}]:{HTTP}/v1/completions", asked)
        found = {"tokens": json.loads(body)["usage"]["completion_tokens"], "completion": status}
        for name, port in METRICS.items():
            found[f"{name} metrics"] = answered(f"http://[{ADDRESS}]:{port}/metrics")[0]
        found["operator health"] = answered(f"http://[{ADDRESS}]:{HEALTH}/healthz")[0]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
