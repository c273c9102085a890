"""Clients connect over TLS; a renewed certificate serves new connections, and open ones go on."""

import asyncio
import contextlib
import math
import ssl

import grpc
import pytest

from moe_api import mounted, tls
from moe_api.supervision import Supervisor
from moe_frontend import edges
from moe_frontend.edges import Guards
from moe_frontend.http import server
from moe_operator.errors import InstallationError
from tests.frontend.http.conftest import http  # noqa: F401 - a fixture
from tests.pki import Authority, mount, refused_content


@pytest.fixture
def authority():
    return Authority()


@pytest.fixture
def folder(tmp_path, authority, monkeypatch):
    monkeypatch.setattr(mounted, "INTERVAL_S", 0.02)
    mount(tmp_path / "tls", authority.pair())
    return tmp_path / "tls"


async def test_grpc_and_http_are_served_over_tls(http, folder, authority):  # noqa: F811
    h = await http(workers=1, guards=Guards(tls=folder), authority=authority)
    assert await h.bench.text("count 3") == "w-0:0 w-0:1 w-0:2 "
    assert (await h.complete("count 2")).json()["choices"][0]["text"] == "w-0:0 w-0:1 "
    spans = [dict(point.attributes) for point in h.metrics("http.server.request.duration")]
    assert spans[0]["url.scheme"] == "https"


async def test_a_plaintext_client_gets_nothing(http, folder, authority):  # noqa: F811
    h = await http(workers=1, guards=Guards(tls=folder), authority=authority)
    async with h.bench.connect() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"HTTP/1.1" not in await reader.read()
    writer.close()


async def presented(port, authority):
    """Whether a client that trusts this authority can connect."""
    context = ssl.create_default_context(cadata=authority.certificate.decode())
    with contextlib.suppress(ssl.SSLError):
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.close()
        return True
    return False


async def test_a_stream_goes_on_while_certificate_and_authority_are_replaced(http, folder, authority):  # noqa: F811
    h = await http(workers=1, guards=Guards(tls=folder), authority=authority)
    grpc_port = int(h.bench.address.rpartition(":")[2])
    h.bench.workers[0].most = 2
    stream = h.bench.generate("count 40")
    text = (await stream.read()).text
    body = asyncio.create_task(h.complete("count 40", max_tokens=64))
    await h.bench.workers[0].until(lambda worker: worker.running == 2)
    other = Authority("another-ca")
    mount(folder, other.pair())
    async with asyncio.timeout(60):
        for port in (grpc_port, h.port):
            while not await presented(port, other):
                await asyncio.sleep(0.02)
            assert not await presented(port, authority)
    await h.bench.workers[0].allow(math.inf)
    while (more := await stream.read()) is not grpc.aio.EOF:
        text += more.text
    assert text == "".join(f"w-0:{i} " for i in range(40))
    assert (await body).json()["choices"][0]["text"].endswith("w-0:39 ")
    async with h.bench.connect(other) as channel:
        await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)


async def test_a_secret_that_is_broken_or_deleted_leaves_the_certificate_in_use(
    http,  # noqa: F811
    folder,
    authority,
    caplog,
):
    h = await http(workers=1, guards=Guards(tls=folder), authority=authority)
    mount(folder, {**authority.pair(), "tls.key": Authority().pair()["tls.key"]})
    await refused_content(caplog)
    assert await presented(h.port, authority)
    mount(folder, {})
    await refused_content(caplog)
    assert await presented(h.port, authority)
    async with h.bench.connect(authority) as channel:
        await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)


async def test_a_client_that_does_not_shake_hands_is_cut_off(http, folder, authority, monkeypatch):  # noqa: F811
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.1)
    h = await http(workers=1, guards=Guards(tls=folder), authority=authority)
    reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
    async with asyncio.timeout(60):
        assert await reader.read() == b""
    writer.close()


async def test_nothing_starts_without_a_certificate(tmp_path):
    mount(tmp_path / "tls", {"tls.crt": "none"})
    with pytest.raises(InstallationError, match=r"it has no tls.key; use a Secret of type kubernetes.io/tls"):
        edges.edge_of(Guards(tls=tmp_path / "tls"), Supervisor())


@pytest.mark.parametrize("spoil", ["tls.crt", "tls.key"])
def test_a_pair_that_does_not_belong_together_is_refused(authority, spoil):
    for other in (authority.pair()[spoil], b"", b"-----BEGIN NONSENSE-----\n"):
        with pytest.raises(ValueError, match=r"tls\."):
            tls.parse({**authority.pair(), spoil: other})
