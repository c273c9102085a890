"""`helm test`: waits until each URL of the command line says that it is healthy; exits with 1 if one fails.

http:// and https:// answer with 200; grpc:// and grpcs:// HOST:PORT answer SERVING (grpc.health.v1).
Certificates are verified: by the authorities in the file CA_FILE, or by the system's if it is empty.
"""

import os
import ssl
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PATIENCE_S = 60.0
CALL_S = 5.0
HEALTHY = ("200", "SERVING")


def answer(url: str, ca_file: str) -> str:
    """What a URL answers, or the error."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme.startswith("grpc"):
        return grpc_answer(parts.netloc, parts.scheme == "grpcs", ca_file)
    try:
        context = ssl.create_default_context(cafile=ca_file or None) if parts.scheme == "https" else None
        with urllib.request.urlopen(url, timeout=CALL_S, context=context) as response:  # noqa: S310 - URLs of the chart
            return str(response.status)
    except OSError as error:
        return str(error)


def grpc_answer(address: str, secure: bool, ca_file: str) -> str:
    """What the health service of an address answers, or the error."""
    trusted = grpc.ssl_channel_credentials(Path(ca_file).read_bytes() if ca_file else None)
    with grpc.secure_channel(address, trusted) if secure else grpc.insecure_channel(address) as channel:
        try:
            found = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
        return health_pb2.HealthCheckResponse.ServingStatus.Name(found.status)


def healthy(url: str, ca_file: str, deadline: float) -> bool:
    """Whether the URL answers that it is healthy before the deadline, in seconds of the monotonic clock."""
    while (said := answer(url, ca_file)) not in HEALTHY and time.monotonic() < deadline:
        time.sleep(1)
    print(f"{url}: {said}", flush=True)
    return said in HEALTHY


if __name__ == "__main__":
    end = time.monotonic() + PATIENCE_S
    results = [healthy(url, os.environ.get("CA_FILE", ""), end) for url in sys.argv[1:]]
    sys.exit(not all(results))
