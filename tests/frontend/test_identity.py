"""Callers are known by their API keys, over gRPC and HTTP; workers learn the tenant only."""

import asyncio
import hashlib

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moe_api import mounted, receiving, rich_status
from moe_frontend.edges import Guards
from moe_frontend.identity import keys
from moe_frontend.identity.caller import ANONYMOUS, Caller
from tests.frontend.http.conftest import http  # noqa: F401 - a fixture
from tests.pki import mount, refused_content


def line(key, name=""):
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {name}".strip()


def bearer(credential):
    return (("authorization", f"Bearer {credential}"),)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(mounted, "INTERVAL_S", 0.02)
    mount(
        tmp_path / "keys", {"team-a": line("alpha", "laptop"), "team-b": f"{line('beta')}\n{line('next')}\n"}
    )
    return tmp_path / "keys"


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rich_status.from_error(caught.value)
    assert rich_status.reason(status) == "INVALID_API_KEY"
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    return status.message


async def test_workers_learn_the_tenant_and_never_a_credential(bench, folder):
    b = await bench(workers=1, guards=Guards(api_keys=folder))
    mine = (*bearer("alpha"), ("x-moe-tenant", "team-b"), ("x-request-id", "7"))
    assert await b.text("count 2", metadata=mine)
    (seen,) = b.workers[0].metadata
    assert seen["x-moe-tenant"] == "team-a"
    assert seen["x-request-id"] == "7"
    assert "authorization" not in seen


async def test_nobody_is_asked_by_default_and_a_clients_own_tenant_is_dropped(bench):
    b = await bench(workers=1)
    assert await b.text("count 1", metadata=(("x-moe-tenant", "team-b"), *bearer("alpha")))
    assert not {"x-moe-tenant", "authorization"} & set(b.workers[0].metadata[0])


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ([], "credentials are missing: the request has no authorization header; send"),
        ([("authorization", "Bearer wrong")], "API key is not valid: no caller has it; check it"),
        ([("authorization", "Bearer alpha2")], "API key is not valid"),
        ([("authorization", "Basic alpha")], "credentials are not understood"),
        ([("authorization", "Bearer")], "credentials are not understood"),
        ([("authorization", "Bearer " + "a" * 8193)], "credentials are not accepted: use at most 8192"),
        ([("authorization", "Bearer alpha"), ("authorization", "Bearer beta")], "credentials are ambiguous"),
        ([("authorization", "Bearer a.b.c")], "API key is not valid"),
    ],
)
async def test_a_request_without_a_caller_is_refused_by_grpc_and_http(bench, http, folder, headers, sentence):  # noqa: F811
    h = await http(workers=1, guards=Guards(api_keys=folder))
    assert (await refusal(h.bench.text("count 1", metadata=tuple(headers)))).startswith(sentence)
    answer = await h.client.post("/v1/completions", json={"prompt": "count 1"}, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (
        401,
        "invalid_request_error",
        "invalid_api_key",
    )
    assert answer.headers["www-authenticate"] == "Bearer"
    assert error["message"].startswith(sentence)
    assert h.bench.workers[0].requests == 0
    assert "alpha" not in error["message"]


async def test_the_openai_client_authenticates(http, folder):  # noqa: F811
    h = await http(workers=1, guards=Guards(api_keys=folder))
    with pytest.raises(openai.AuthenticationError) as caught:
        await h.openai.models.list()
    assert caught.value.code == "invalid_api_key"
    async with openai.AsyncOpenAI(base_url=f"{h.url}/v1", api_key="beta", max_retries=0) as client:
        assert (await client.models.list()).data[0].id == "m"
        assert (await client.completions.create(model="m", prompt="count 1")).choices
    assert h.bench.workers[0].metadata[-1]["x-moe-tenant"] == "team-b"


async def test_probes_need_no_key_and_reflection_does(bench, http, folder):  # noqa: F811
    h = await http(workers=1, guards=Guards(api_keys=folder))
    channel = h.bench.channel
    checked = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert checked.status == health_pb2.HealthCheckResponse.SERVING
    for path in ("/health", "/version", "/metrics"):
        assert (await h.client.get(path)).status_code == 200
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked)
    assert (await refusal(listing.read())).startswith("credentials are missing")


async def test_a_large_request_without_a_key_is_refused_before_it_is_received(bench, folder, monkeypatch):
    b = await bench(workers=1, guards=Guards(api_keys=folder))
    received = []
    monkeypatch.setattr(receiving.Receiver, "receive", lambda *_: received.append(1))
    assert await refusal(b.text("x" * (15 * 2**20)))
    assert not received


async def test_a_huge_header_is_refused_and_harms_nobody(bench, folder):
    b = await bench(workers=1, guards=Guards(api_keys=folder))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await b.text("count 1", metadata=bearer("a" * 100_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await b.text("count 1", metadata=bearer("alpha"))


async def test_keys_are_added_and_taken_away_without_a_restart(bench, folder):
    b = await bench(workers=1, guards=Guards(api_keys=folder))
    running = b.generate("count 30 0.05", metadata=bearer("alpha"))
    await running.read()
    mount(folder, {"team-c": line("gamma")})
    async with asyncio.timeout(60):
        while not b.edge.authenticator._keys().caller("gamma"):
            await asyncio.sleep(0.01)
    assert await b.text("count 1", metadata=bearer("gamma"))
    assert await refusal(b.text("count 1", metadata=bearer("alpha")))
    running.cancel()


async def test_an_empty_secret_lets_nobody_in_and_a_broken_one_changes_nothing(bench, folder, caplog):
    b = await bench(workers=1, guards=Guards(api_keys=folder))
    mount(folder, {"team-a": "alpha in plain text"})
    await refused_content(caplog)
    assert await b.text("count 1", metadata=bearer("alpha"))
    mount(folder, {})
    async with asyncio.timeout(60):
        while len(b.edge.authenticator._keys()):
            await asyncio.sleep(0.01)
    assert await refusal(b.text("count 1", metadata=bearer("alpha")))


def test_a_secret_names_tenants_and_their_keys():
    known = keys.parse(
        {"team-a": f"# rotated\n{line('one', 'my laptop')}\n\n{line('two')}".encode(), "b": b""}
    )
    assert known.caller("one") == Caller("team-a", "my laptop")
    assert known.caller("two") == Caller("team-a")
    assert known.caller("three") is None
    assert ANONYMOUS.tenant == ""


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a": b"secret-key"}, r"entry 'a', line 1 is not the digest of a key; write sha256:"),
        ({"a": b"\xff\xfe"}, r"entry 'a', line 1 is not the digest"),
        ({"a": b"sha256:" + b"0" * 63}, r"is not the digest"),
        ({"a": line("k").encode(), "b": line("k").encode()}, r"entry 'b', line 1 repeats a key"),
        ({"-a": b""}, r"entry '-a' names no tenant; use 1 to 253"),
        ({"a": b"\n".join(line(str(i)).encode() for i in range(20_001))}, r"there are 20001 keys; 20000 is"),
    ],
)
def test_what_is_wrong_with_a_secret_is_said_without_quoting_it(files, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        keys.parse(files)
    assert "secret-key" not in str(caught.value)
