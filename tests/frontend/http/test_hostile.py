"""Bad input over HTTP: each a sentence in OpenAI's form, nothing lost, nobody else slower."""

import asyncio
import contextlib
import dataclasses
import json
import math
import re
import socket
import tracemalloc

import grpc
import httpx2
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_api.receiving import InProgress
from moe_frontend.discovery.endpoints import Served
from moe_frontend.http import bodies, prompts
from moe_frontend.http.bodies import check_depth, decode
from moe_frontend.http.chats import requests
from moe_frontend.http.completions import plan
from moe_frontend.http.conversation import Conversation
from moe_frontend.http.errors import ApiError
from moe_frontend.http.events import EventStream
from moe_frontend.http.protocol import BoundedProtocol
from moe_frontend.http.schemas import ChatRequest, CompletionRequest

WRONG = [
    ({"prompt": 7}, "prompt", "prompt is not valid: expected"),
    ({"prompt": None}, "prompt", "prompt is missing"),
    ({}, "prompt", "prompt is missing"),
    ({"prompt": []}, "prompt", "prompt is an empty list"),
    ({"prompt": ["a", 1]}, "prompt", "mixes"),
    ({"prompt": [["a"]]}, "prompt[0][0]", "expected"),
    ({"prompt": [-1]}, "prompt[0]", "expected"),
    ({"prompt": [2**32]}, "prompt[0]", "expected"),
    ({"prompt": ["a"] * 129}, "prompt", "prompt asks for 129 texts"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "n asks for 130 texts (65 prompts, n = 2)"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "is 0, which needs echo"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "expected int >= 0"),
    ({"prompt": "a", "max_tokens": "7"}, "max_tokens", "expected int | null, got str"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "got float"),
    ({"prompt": "a", "n": 0}, "n", "expected int >= 1"),
    ({"prompt": "a", "n": 1000}, "n", "expected int <= 128"),
    ({"prompt": "a", "best_of": 2}, "best_of", "leave it out, or give the value of n"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "is not supported"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "expected int <= 20"),
    ({"prompt": "a", "stream_options": {}}, "stream_options", "is only for streams"),
    ({"prompt": "a", "stream": "yes"}, "stream", "expected bool"),
    (
        {"prompt": "a", "logit_bias": {"x": 1}},
        "logit_bias",
        "has a key that is not valid: expected int, got str",
    ),
    ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias[...]", "expected float <= 100"),
    ({"prompt": "a", "temprature": 1}, "temprature", "is not a field of this request"),
    ({"prompt": "a", "": 1}, "", '"" is not a field of this request'),
    ({"prompt": "a", " \n": 1}, " \n", '" \\n" is not a field of this request'),
    ({"prompt": "a", "x`y": 1}, "x`y", "x`y is not a field of this request"),
    ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x", "is not a field"),
    ({"prompt": "a", "stop": 5}, "stop", "expected"),
    ({"prompt": "a", "seed": 2**64}, "seed", "expected"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", "holds 17 texts; use 16 at most"),
    ({"prompt": list(range(5000))}, "prompt", "prompt has 5000 tokens; use 4095 at most"),
]


@pytest.mark.parametrize(("body", "param", "sentence"), WRONG)
async def test_a_wrong_field_is_named_in_a_sentence(http, body, param, sentence):
    h = await http(workers=1)
    response = await h.client.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert sentence in error["message"]
    assert h.bench.workers[0].requests == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[]", "the body is not such a request: expected object"),
        (b'{"prompt": "a"} x', "is not valid JSON"),
        (b'{"prompt": "\xff"}', "is not valid JSON"),
        (b'{"prompt": "\\ud800"}', "is not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "is not valid JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": ' + b"[" * 100_000, "prompt"),
        (b'{"metadata": {"a": ' + b"[" * 100_000, "the body is nested too deeply"),
        (b"\xef\xbb\xbf{}", "is not valid JSON: invalid character"),
        (
            b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "a", '
            b'"schema": {"title": "\xff"}}}}',
            "response_format.json_schema.schema is not UTF-8",
        ),
    ],
)
async def test_what_is_no_request_is_refused(http, content, sentence):
    h = await http(workers=1)
    headers = {"content-type": "application/json"}
    response = await h.client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "application/vnd.api+json"}, 200),
    ],
)
async def test_bodies_are_plain_json(http, headers, status):
    h = await http(workers=1)
    body = json.dumps({"prompt": "count 1"})
    response = await h.client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == status


async def test_unknown_paths_and_methods_are_refused_in_the_same_form(http):
    h = await http(workers=1)
    for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/v1/nothing", 404)):
        response = await h.client.request(method, path)
        assert response.status_code == status
        assert f"{method} {path}" in response.json()["error"]["message"]
    assert (await h.client.get("/v1/completions")).headers["allow"] == "POST"
    assert (await h.client.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"


async def test_a_body_that_is_too_large_is_refused_before_it_is_held(http):
    h = await http(workers=1)
    most = bodies.most_bytes(4096)
    assert most == 2**20
    for size in (most + 1, 10 * 2**20):
        response = await h.complete("x" * size)
        assert response.status_code == 413
        assert "1048576 bytes are allowed" in response.json()["error"]["message"]

    async def parts():
        for _ in range(200):
            yield b"x" * 65_536

    headers = {"content-type": "application/json"}
    response = await h.client.post("/v1/completions", content=parts(), headers=headers)
    assert response.status_code == 413
    assert (await h.complete("count 1")).status_code == 200


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """No connection ends for the time that its head takes, but where a test is about that."""
    monkeypatch.setattr(BoundedProtocol, "head_s", 600.0)


async def until(condition, most_s=60):
    async with asyncio.timeout(most_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_many_large_bodies_at_once_are_bounded_together(http):
    in_progress = InProgress(most=1_600_000, small_only=0)
    h = await http(workers=1, in_progress=in_progress)
    rest = asyncio.Event()

    async def slow():
        yield b'{"prompt": "count 1' + b" " * 500_000
        await rest.wait()
        yield b'"}'

    headers = {"content-type": "application/json"}
    first = asyncio.create_task(h.client.post("/v1/completions", content=slow(), headers=headers))
    await until(lambda: in_progress.held >= 500_000)
    refused = await h.complete("x" * 600_000)  # and the request to a replica, which has a copy
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert in_progress.held < 600_000
    rest.set()
    assert (await first).status_code == 200
    assert in_progress.held == 0
    assert (await h.complete("count 1")).status_code == 200


async def test_many_slow_bodies_leave_room_for_small_requests_of_both_protocols(http):
    # 40 bodies of 2 MB, in as much memory as 10 of them need.
    in_progress = InProgress(most=20 * 2**20, small_only=2**20)
    h = await http(workers=1, in_progress=in_progress)
    endpoint = next(iter(h.bench.replicas.endpoints()))
    large = dataclasses.replace(endpoint, context_length=2**16, served=Served("m", 2**16))
    h.bench.replicas.update(frozenset({large}))
    size = 2 * 10**6
    head = POST + b"content-length: %d\r\n\r\n" % size
    clients = [await asyncio.open_connection("127.0.0.1", h.port) for _ in range(40)]
    refused = [asyncio.create_task(reader.readuntil(b"\r\n\r\n")) for reader, _ in clients]
    for _, writer in clients:
        writer.write(head + b'{"prompt": "' + b"x" * (size // 2))
    for _, writer in clients:
        with contextlib.suppress(ConnectionError):
            writer.write(b"x" * (size // 4))
    await until(lambda: sum(task.done() for task in refused) >= 20)
    answered = [task for task in refused if task.done() and task.exception() is None]
    assert all(b" 429 " in task.result() for task in answered)
    assert in_progress.held <= 19 * 2**20
    assert (await h.complete("count 1")).status_code == 200
    assert await h.bench.text("count 1") == "w-0:0 "
    with pytest.raises(grpc.aio.AioRpcError, match="the requests in progress leave no room"):
        await h.bench.text("x" * 8 * 2**20)
    for task, (_, writer) in zip(refused, clients, strict=True):
        task.cancel()
        writer.close()
    await until(lambda: in_progress.held == 0)


async def test_a_request_is_counted_until_its_answer_ends(http):
    in_progress = InProgress()
    h = await http(workers=1, in_progress=in_progress)
    asked = asyncio.create_task(h.complete("silent" + " " * 50_000))
    await h.bench.workers[0].until(lambda worker: worker.running == 1)
    assert in_progress.held > 100_000  # the body, and the request to a replica
    asked.cancel()
    await until(lambda: in_progress.held == 0)


async def test_a_body_that_does_not_come_is_given_up(http):
    h = await http(workers=1, limit_s=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{"
    )
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    assert head.startswith(b"HTTP/1.1 408 ")
    writer.close()


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nx: ", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET"]
)
async def test_a_head_that_does_not_end_costs_the_connection(http, monkeypatch, sent):
    monkeypatch.setattr(BoundedProtocol, "head_s", 0.5)
    h = await http(workers=1)
    reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
    writer.write(sent)

    async def drip():
        while True:
            await asyncio.sleep(0.1)
            writer.write(b"y")

    dripping = asyncio.create_task(drip()) if sent else None
    with contextlib.suppress(ConnectionError):
        while await asyncio.wait_for(reader.read(1000), 60):
            pass
    if dripping is not None:
        dripping.cancel()
    writer.close()


async def test_connections_are_bounded(http, monkeypatch):
    monkeypatch.setattr(BoundedProtocol, "connections_most", 5)
    h = await http(workers=1)
    held = [await asyncio.open_connection("127.0.0.1", h.port) for _ in range(5)]
    with pytest.raises(httpx2.HTTPError):
        await h.client.get("/health")
    held[0][1].close()
    async with asyncio.timeout(60):
        while True:
            try:
                response = await h.client.get("/health")
            except httpx2.HTTPError:
                await asyncio.sleep(0.05)
                continue
            break
    assert response.status_code == 200
    for _, writer in held[1:]:
        writer.close()


async def test_bytes_that_are_no_http_are_answered_and_forgotten(http):
    h = await http(workers=1)
    for sent in (
        b"\x16\x03\x01\x02\x00" * 50 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"x" * 100_000,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
        writer.write(sent)
        with contextlib.suppress(ConnectionError):
            assert (await asyncio.wait_for(reader.read(100), 60))[:10] in (b"HTTP/1.1 4", b"")
        writer.close()
    assert (await h.complete("count 1")).status_code == 200


async def exchanged(h, *parts):
    """What comes back for these bytes, sent one after the other's answer, until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
    answered = b""
    for part in parts:
        if answered or part is not parts[0]:
            answered += await asyncio.wait_for(reader.readuntil(b"}}"), 60)
        writer.write(part)
    with contextlib.suppress(ConnectionError):
        answered += await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return answered


POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}x",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        POST
        + b"content-length: 30\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost:x\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    ],
)
async def test_a_request_without_one_meaning_is_refused_in_openais_form_and_ends_its_connection(http, sent):
    h = await http(workers=1)
    answered = await exchanged(h, sent)
    head, _, body = answered.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert b"connection: close" in head.lower()


async def test_bytes_behind_an_answer_that_are_no_http_end_the_connection_without_a_traceback(http, caplog):
    h = await http(workers=1)
    begun = b"POST /nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert (await exchanged(h, begun, b"zz\r\n")).count(b"HTTP/1.1") == 1
    assert not caplog.records


async def test_a_body_in_tiny_chunks_is_refused_before_it_costs(http):
    h = await http(workers=1)
    begun = POST + b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    answered = await exchanged(h, begun + b"1\r\n \r\n" * 20_000)
    assert answered.startswith(b"HTTP/1.1 400 ")
    assert b"tiny chunks" in answered
    body = json.dumps({"prompt": "count 1"}).encode()
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert (await exchanged(h, begun.replace(b"host: x", b"host: x\r\nconnection: close") + pieces))[:12] == (
        b"HTTP/1.1 200"
    )


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_a_head_is_bounded_however_fast_it_comes(http, path):
    h = await http(workers=1)
    response = await h.client.get(path, headers={"x-large": "x" * 20_000})
    assert response.status_code == 431
    assert "larger than 16384 bytes" in response.json()["error"]["message"]
    assert (await h.client.get(path, headers={"x-large": "x" * 15_000})).status_code == 200


@pytest.mark.parametrize("ahead", [b"\r\n", b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n" * 2])
@pytest.mark.parametrize("together", [True, False])
async def test_a_client_that_sent_more_and_left_frees_its_worker(http, ahead, together):
    h = await http(workers=1)
    _, writer = await asyncio.open_connection("127.0.0.1", h.port)
    body = json.dumps({"prompt": "silent"}).encode()
    writer.write(POST + b"content-length: %d\r\n\r\n%s" % (len(body), body) + (ahead if together else b""))
    await h.bench.workers[0].until(lambda worker: worker.running == 1)
    if not together:
        writer.write(ahead)
        await writer.drain()
        await asyncio.sleep(0.1)  # so that it is read before the connection ends
    writer.close()
    await h.bench.workers[0].until(lambda worker: worker.running == 0)


async def test_a_client_that_left_while_the_frontend_was_busy_costs_no_worker(http, caplog):
    h = await http(workers=1)
    body = json.dumps({"prompt": "silent"}).encode()
    for _ in range(3):  # the event loop does not run meanwhile
        with socket.create_connection(("127.0.0.1", h.port)) as client:
            client.sendall(POST + b"content-length: %d\r\n\r\n%s" % (len(body), body))
    assert (await h.complete("count 1")).status_code == 200
    left = [
        p
        for p in h.metrics("http.server.request.duration")
        if p.attributes.get("error.type") == "client_gone"
    ]
    assert sum(point.count for point in left) == 3
    assert h.bench.workers[0].requests == 1
    assert not caplog.records


async def test_what_nobody_foresaw_is_an_error_in_openais_form(http, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("moe_frontend.http.app.plan", fails)
    h = await http(workers=1)
    response = await h.complete("count 1")
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
    error = response.json()["error"]
    assert response.headers["x-request-id"] in error["message"]
    assert error["type"] == "server_error"
    assert "secret" not in response.text


async def test_a_stream_begins_with_its_head_whoever_is_first():
    sent, room = [], asyncio.Event()

    async def send(message):
        if message["type"] == "http.response.start":
            await room.wait()
        sent.append(message["type"])

    stream = EventStream(send)
    texts = [asyncio.create_task(stream.event(b"{}")) for _ in range(3)]
    await asyncio.sleep(0)
    room.set()
    await asyncio.gather(*texts)
    assert sent == ["http.response.start"] + ["http.response.body"] * 3


async def test_a_stream_that_nobody_reads_is_stopped(http):
    h = await http(workers=1, write_timeout_s=0.5)
    _, writer = await asyncio.open_connection("127.0.0.1", h.port, limit=1024)
    body = json.dumps({"prompt": "flood 2000", "stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    await h.bench.workers[0].until(lambda worker: worker.requests == 1 and worker.running == 0)
    assert (await h.complete("count 1")).status_code == 200
    writer.close()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = st.sampled_from([field.name for field in msgspec.structs.fields(CompletionRequest)])


def refusal(body):
    """Why the body is refused; the requests that it asks for, where it is not."""
    try:
        return plan(decode(body, CompletionRequest), Served("m", 4096)).requests
    except ApiError as error:
        return error


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_FIELDS, _JSON, max_size=6))
def test_any_value_of_any_field_is_taken_or_refused_by_name(body):
    found = refusal(json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass"))
    if not isinstance(found, ApiError):
        assert all(request.SerializeToString() for request in found)
        return
    assert found.status == 400
    assert re.match(r"(the body |\"|\w+)", found.message)
    assert found.param is None or re.split(r"[.[]", found.param)[0] in {*body, "prompt"}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_taken(body):
    found = refusal(body)
    assert isinstance(found, list) or found.status == 400


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, b'{"metadata": {"a": %s}}'),
        (ChatRequest, b'{"messages": [{"role": "user", "annotations": %s}]}'),
        (ChatRequest, b'{"tool_choice": {"type": "function", "function": %s}}'),
        (ChatRequest, b'{"functions": %s}'),
    ],
)
def test_nothing_is_built_of_values_that_are_ignored_or_refused(kind, body):
    large = body % (b"[" + b",".join([b"[]"] * 300_000) + b"]")
    tracemalloc.start()
    with contextlib.suppress(ApiError):
        decode(large, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(large) / 4


def test_numbers_beyond_a_float_become_what_the_worker_refuses():
    asked = plan(decode(b'{"prompt": "a", "temperature": 1e300}', CompletionRequest), Served())
    assert math.isinf(asked.requests[0].sampling.temperature)


def test_nesting_is_bounded_without_recursion():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ApiError, match="nested more than 64 deep"):
        check_depth("tools", deep)
    check_depth("tools", {"a": [1, {"b": "c"}]})


@pytest.mark.parametrize(
    ("prompt", "n"), [("x" * 2**20, 65), (["x" * 2**20] * 2, 33), (list(range(2**20)), 65)]
)
def test_copies_of_a_prompt_are_bounded_together(prompt, n):
    with pytest.raises(ApiError, match=r"n asks for \d+ texts of \d+ characters") as caught:
        plan(CompletionRequest(prompt=prompt, n=n), Served("m", 2**17))
    assert (caught.value.status, caught.value.param) == (400, "n")
    with pytest.raises(ApiError, match="n asks for 65 texts"):
        requests(ChatRequest(n=65), Served("m", 2**17), Conversation("", {}, False, None), "x" * 2**20)


def test_one_prompt_of_ids_is_one_prompt():
    assert prompts.prompts([1, 2]) == [[1, 2]]
    assert prompts.prompts([[1], [2]]) == [[1], [2]]
    assert prompts.prompts(["a", "b"]) == ["a", "b"]
