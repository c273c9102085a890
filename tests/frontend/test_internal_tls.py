"""Mutual TLS between a frontend, its workers and the operator, with certificates as the operator issues."""

import asyncio
import dataclasses
import math
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from moe_api import mounted, mutual
from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_api.supervision import Supervisor
from moe_frontend.discovery.connecting import Connector
from moe_frontend.discovery.endpoints import endpoints
from moe_frontend.discovery.probing import Prober
from moe_frontend.edges import Guards
from moe_operator.certificates import renewal
from moe_operator.certificates.issuing import issue, new_authority
from moe_operator.executor.certificates import files
from moe_operator.resources import names, peers
from moe_operator.rpc.dialing import Dialer
from moe_operator.rpc.pods import PodClient
from moe_worker.service import listening
from tests.frontend.fake_worker import FakeWorker
from tests.pki import mount


class Installation:
    """The folders of a worker and a frontend, and what the operator mounts there."""

    def __init__(self, folder):
        self.worker, self.frontend = folder / "worker", folder / "frontend"
        self.supervisor = Supervisor()
        self.old, self.new = (new_authority("prod", datetime.now(UTC) + timedelta(seconds=i)) for i in (0, 1))
        self.renew(self.old, [self.old])

    def issue(self, component, signer, trusted):
        return issue(signer, component, renewal.bundle(trusted), datetime.now(UTC))

    def renew(self, signer, trusted):
        for component, folder in ((mutual.WORKER, self.worker), (mutual.FRONTEND, self.frontend)):
            mount(folder, files(self.issue(component, signer, trusted)))

    def credentials(self):
        return listening.credentials(self.worker, self.supervisor)


@pytest.fixture
async def installation(tmp_path, monkeypatch):
    monkeypatch.setattr(mounted, "INTERVAL_S", 0.02)
    made = Installation(tmp_path)
    yield made
    await made.supervisor.close()


async def secured(bench, installation, workers=1):
    return await bench(
        workers=workers,
        guards=Guards(internal_tls=installation.frontend),
        credentials=installation.credentials(),
    )


async def accepted(address, pair=None, name=mutual.WORKER):
    """Whether a server answers a client with this certificate; none stands for plaintext."""
    options = (*mutual.expecting(name), ("grpc.use_local_subchannel_pool", 1))
    opened = (
        grpc.aio.insecure_channel(address, options=options)
        if pair is None
        else grpc.aio.secure_channel(address, mutual.channel_credentials(pair), options=options)
    )
    async with opened as channel:
        try:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)
        except grpc.aio.AioRpcError:
            return False
        return True


async def test_workers_serve_frontends_and_the_operator_and_nobody_else(bench, installation):
    b = await secured(bench, installation)
    assert await b.text("count 2") == "w-0:0 w-0:1 "
    address, old = b.worker("w-0").endpoint.address, installation.old
    assert await accepted(address, installation.issue(mutual.FRONTEND, old, [old]))
    assert await accepted(address, installation.issue(mutual.OPERATOR, old, [old]))
    assert not await accepted(address)
    assert not await accepted(address, installation.issue(mutual.WORKER, old, [old]))
    foreign = new_authority("dev", datetime.now(UTC))
    assert not await accepted(address, installation.issue(mutual.FRONTEND, foreign, [old]))
    without = dataclasses.replace(installation.issue(mutual.FRONTEND, old, [old]), certificate=b"", key=b"")
    credentials = grpc.ssl_channel_credentials(without.authorities)
    async with grpc.aio.secure_channel(
        address, credentials, options=mutual.expecting(mutual.WORKER)
    ) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)


async def test_a_frontend_sends_nothing_to_what_is_no_worker(bench, installation):
    """A pod of the namespace that has a frontend's certificate is not a worker."""
    b = await bench(workers=0, guards=Guards(internal_tls=installation.frontend), patience_s=0.2)
    fake = FakeWorker("w-0")
    old = installation.old
    mount(installation.worker, files(installation.issue(mutual.FRONTEND, old, [old])))
    await fake.start(credentials=installation.credentials())
    b.workers.append(fake)
    await b.publish()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await b.text("count 2", timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert fake.requests == 0


async def test_workers_with_and_without_tls_serve_together_while_a_rollout_turns_it_on(bench, installation):
    b = await secured(bench, installation)
    plain = FakeWorker("w-plain")
    await plain.start()
    b.workers.append(plain)
    await b.publish()
    texts = await asyncio.gather(*(b.text("together 2") for _ in range(4)))
    assert set(texts) == {"w-0 ", "w-plain "}


async def test_a_stream_goes_on_while_certificates_and_the_authority_are_replaced(bench, installation):
    b = await secured(bench, installation)
    old, new = installation.old, installation.new
    address = b.worker("w-0").endpoint.address
    reopened = []
    b.replicas.listen(lambda: reopened.append(b.replicas.targets()[0].channel))
    b.worker("w-0").most = 2
    stream = b.generate("count 60")
    text = (await stream.read()).text
    client = installation.issue(mutual.FRONTEND, new, [old, new])
    renewals = (old, [old, new]), (new, [old, new]), (new, [new])
    for number, (signer, trusted) in enumerate(renewals, 1):
        installation.renew(signer, trusted)
        wanted = files(installation.issue(mutual.OPERATOR, signer, trusted))["ca.crt"]
        async with asyncio.timeout(60):
            while b.edge.internal.pair().authorities != wanted or not await accepted(address, client):
                await asyncio.sleep(0.02)
            # Who watches replicas follows their channels.
            while len({*reopened}) < number:
                await asyncio.sleep(0.02)
        assert await b.text("count 2") == "w-0:0 w-0:1 "
    await b.worker("w-0").allow(math.inf)
    while (more := await stream.read()) is not grpc.aio.EOF:
        text += more.text
    assert text == "".join(f"w-0:{i} " for i in range(60))
    assert b.worker("w-0").requests == 4, "no stream was replayed"
    assert len({*reopened}) == len(renewals)
    async with asyncio.timeout(60):
        while not await accepted(address, client) or await accepted(
            address, installation.issue(mutual.FRONTEND, old, [old, new])
        ):
            await asyncio.sleep(0.02)
        while b.replicas._leaving:
            await asyncio.sleep(0.02)


async def test_health_is_watched_over_tls_and_follows_a_new_authority(installation):
    supervisor, published = Supervisor(), asyncio.Queue()
    held = mounted.Mounted(installation.frontend, mutual.parse)
    connector = Connector(lambda: held.value)
    prober = Prober(lambda: published.put_nowait(prober.serving), supervisor, connector)
    worker = FakeWorker("w-0", "r")
    endpoint = await worker.start(credentials=installation.credentials())
    prober.update(frozenset({endpoint}))
    async with asyncio.timeout(60):
        assert {one.revision for one in await published.get()} == {"r"}
    await worker.server.stop(None)
    installation.renew(installation.new, [installation.new])
    await held.refresh()
    again = FakeWorker("w-0", "s")
    credentials = installation.credentials()
    await again.start(endpoint.address, credentials=credentials)
    async with asyncio.timeout(60):
        while {one.revision for one in prober.serving} != {"s"}:
            await published.get()
    await prober.close()
    await supervisor.close()
    await again.server.stop(None)


async def test_the_operator_alone_reaches_the_admin_port_and_probes_have_their_own(bench, installation):
    b = await secured(bench, installation)
    admin = await b.frontend.start_admin("127.0.0.1:0", b.edge.internal.server_credentials())
    health = await b.frontend.start_health("127.0.0.1:0")
    old = installation.old
    own = installation.issue(mutual.OPERATOR, old, [old])
    held = {"prod": own}
    dialer = Dialer(held.get)
    address = peers.secure(names.ROLE_FRONTEND, "prod", "127.0.0.1", admin)

    def routes(at):
        with dialer.channel(at) as channel:
            stub = frontend_pb2_grpc.FrontendServiceStub(channel)
            return stub.GetRoutes(frontend_pb2.GetRoutesRequest(), timeout=60).routes

    (route,) = await asyncio.to_thread(routes, address)
    assert route.name == "w-0"
    for wrong in (
        peers.secure(names.ROLE_WORKER, "prod", "127.0.0.1", admin),
        peers.secure(names.ROLE_FRONTEND, "dev", "127.0.0.1", admin),
        f"127.0.0.1:{admin}",
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.to_thread(routes, wrong)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await accepted(f"127.0.0.1:{health}")
    assert not await accepted(f"127.0.0.1:{admin}")
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(routes, f"127.0.0.1:{health}")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_operators_kept_connection_follows_its_certificate(installation):
    old, new = installation.old, installation.new
    held = {"prod": installation.issue(mutual.OPERATOR, old, [old])}
    client = PodClient(5.0, Dialer(held.get))
    worker = FakeWorker("w-0")
    endpoint = await worker.start(credentials=installation.credentials())
    port = int(endpoint.address.rpartition(":")[2])
    address = peers.secure(names.ROLE_WORKER, "prod", "127.0.0.1", port)
    opened = await client._channel(address)
    assert await client._channel(address) is opened
    held["prod"] = installation.issue(mutual.OPERATOR, new, [old, new])
    assert await client._channel(address) is not opened
    await client.close()
    await worker.server.stop(None)


def slices(*ports):
    return {
        "addressType": "IPv4",
        "ports": [{"name": name, "port": 8000} for name in ports],
        "endpoints": [{"addresses": ["10.0.0.1"], "targetRef": {"name": "docs-0-0"}}],
    }


@pytest.mark.parametrize(
    ("ports", "secure"),
    [(["grpc"], False), (["grpc-tls"], True), (["other"], False), (["", "grpc-tls"], True)],
)
def test_the_name_of_the_port_says_what_a_worker_speaks(ports, secure):
    (found,) = endpoints([slices(*ports)])
    assert (found.name, found.address, found.secure) == ("docs-0-0", "10.0.0.1:8000", secure)


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("10.0.0.1", ("10.0.0.1", "", "")),
        ("[fd00::1]:8001", ("[fd00::1]:8001", "", "")),
        (peers.secure("worker", "prod", "fd00::1", 8000), ("[fd00::1]:8000", "worker", "prod")),
        (peers.secure("frontend", "a-1", "10.0.0.1", 8001), ("10.0.0.1:8001", "frontend", "a-1")),
    ],
)
def test_an_address_says_who_is_expected(address, parsed):
    assert tuple(peers.parse(address)) == parsed
