"""Reflection and health as a client that has none of our stubs uses them."""

import asyncio
import json
import subprocess
import sys

import pytest

from localcluster import build
from localcluster.progress import Reporter


@pytest.fixture(scope="module")
def grpcurl():
    with Reporter(sys.stderr) as reporter:
        executable = build.ensure(["grpcurl"], reporter.show)["grpcurl"]

    async def run(*args):
        command = [executable, "-plaintext", *args]
        return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)

    return run


async def test_grpcurl_lists_and_describes_the_services(bench, grpcurl):
    b = await bench(workers=0)
    listed = (await grpcurl(b.address, "list")).stdout.split()
    assert {"grpc.health.v1.Health", "moe_api.inference.v1.InferenceService"} <= set(listed)
    described = (await grpcurl(b.address, "describe", "moe_api.inference.v1.SamplingParameters")).stdout
    assert "optional float temperature = 2;" in described


async def test_grpcurl_streams_and_shows_error_details(bench, grpcurl):
    b = await bench(workers=1)
    method = "moe_api.inference.v1.InferenceService/Generate"
    result = await grpcurl("-d", json.dumps({"prompt": "count 2"}), b.address, method)
    assert result.stdout.count('"text": "w-0:') == 2
    assert '"finish_reason": "FINISH_REASON_LENGTH"' in result.stdout
    refused = await grpcurl("-d", json.dumps({"prompt": "bad"}), b.address, method)
    assert "Code: InvalidArgument" in refused.stderr
    assert '"field": "sampling.top_p"' in refused.stderr


async def test_grpcurl_reads_health(bench, grpcurl):
    b = await bench(workers=1)
    for service in ("", "liveness"):
        data = json.dumps({"service": service})
        result = await grpcurl("-d", data, b.address, "grpc.health.v1.Health/Check")
        assert json.loads(result.stdout) == {"status": "SERVING"}
