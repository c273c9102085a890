"""The audit log has one line for each request, with its caller and its end, and nothing of its content."""

import asyncio
import json

import grpc
import pytest

from moe_frontend.edges import Guards
from tests.frontend.http.conftest import http  # noqa: F401 - a fixture
from tests.frontend.test_identity import bearer, folder, line  # noqa: F401 - a fixture
from tests.pki import mount

FIELDS = {
    *("time", "request_id", "protocol", "method", "tenant", "caller", "status"),
    *("prompt_tokens", "completion_tokens", "duration_s"),
}
GENERATE = "moe_api.inference.v1.InferenceService/Generate"


async def until(b, number):
    async with asyncio.timeout(60):
        while len(b.audited) < number:
            await asyncio.sleep(0.01)
    return b.audited[number - 1]


async def test_grpc_calls_are_logged_with_their_end(bench, folder):  # noqa: F811
    b = await bench(workers=1, guards=Guards(api_keys=folder))
    await b.text("count 3", metadata=(*bearer("alpha"), ("x-request-id", "r-1")))
    done = await until(b, 1)
    assert set(done) == FIELDS
    assert (done["tenant"], done["caller"], done["status"]) == ("team-a", "laptop", "OK")
    assert (done["protocol"], done["method"], done["request_id"]) == ("grpc", GENERATE, "r-1")
    assert done["completion_tokens"] == 3
    with pytest.raises(grpc.aio.AioRpcError):
        await b.text("bad", metadata=bearer("beta"))
    assert ((await until(b, 2))["tenant"], b.audited[1]["status"]) == ("team-b", "INVALID_ARGUMENT")
    with pytest.raises(grpc.aio.AioRpcError):
        await b.text("count 1", metadata=bearer("wrong"))
    assert ((await until(b, 3))["tenant"], b.audited[2]["status"]) == ("", "UNAUTHENTICATED")
    b.workers[0].most = 1
    call = b.generate("count 100", metadata=bearer("alpha"))
    await call.read()
    call.cancel()
    left = await until(b, 4)
    assert left["status"] == "CANCELLED"
    assert left["completion_tokens"] >= 1


async def test_http_requests_are_logged_with_their_route(http, folder):  # noqa: F811
    h = await http(workers=1, guards=Guards(api_keys=folder))
    headers = {"authorization": "Bearer alpha", "x-request-id": "r-2"}
    private = "count 2 0 and a secret"
    await h.client.post("/v1/completions", json={"prompt": "count 2", "user": private}, headers=headers)
    done = await until(h.bench, 1)
    assert (done["protocol"], done["method"], done["status"]) == ("http", "POST /v1/completions", 200)
    assert (done["tenant"], done["request_id"], done["completion_tokens"]) == ("team-a", "r-2", 2)
    await h.client.get("/v1/models")
    assert ((await until(h.bench, 2))["status"], h.bench.audited[1]["tenant"]) == (401, "")
    await h.client.get("/health")
    await h.client.get("/nowhere", headers=headers)
    assert (await until(h.bench, 3))["status"] == 404
    text = json.dumps(h.bench.audited)
    assert "secret" not in text
    assert "alpha" not in text
    assert "nowhere" not in text


async def test_the_command_prints_it(command, tmp_path):
    mount(tmp_path / "keys", {"team-a": line("alpha")})
    options = ["--static", "127.0.0.1:9", "--hold", "5", "--audit-log", "--api-keys", str(tmp_path / "keys")]
    process, address = await command(*options, stdout=True)
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(f"/{GENERATE}")(b"", timeout=60)
    printed = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
    assert (printed["method"], printed["status"]) == (GENERATE, "UNAUTHENTICATED")
