"""Certificates of internal TLS: what is issued, when it is renewed, and that no Secret is written in vain."""

import asyncio
import base64
import itertools
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from moe_api import mutual, tls
from moe_operator.certificates import renewal
from moe_operator.certificates.issuing import AUTHORITY_LIFE, LIFE, Authority, issue, new_authority
from moe_operator.errors import ApplyRefusedError, ChangedMeanwhileError, ClusterUnavailableError
from moe_operator.executor.certificates import CHECKED_S, FAILED_S, NEEDED_S, Certificates, files
from moe_operator.resources import names

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def issued(component=mutual.WORKER, now=NOW, known=None):
    known = known or renewal.renewed((), "prod", now)
    return files(issue(renewal.signing(known, now), component, renewal.bundle(known), now)), known


@pytest.mark.parametrize(
    ("component", "purpose", "accepted"),
    [
        (mutual.WORKER, "sslserver", True),
        (mutual.WORKER, "sslclient", False),
        (mutual.FRONTEND, "sslserver", True),
        (mutual.FRONTEND, "sslclient", True),
        (mutual.OPERATOR, "sslclient", True),
        (mutual.OPERATOR, "sslserver", False),
    ],
)
def test_openssl_accepts_a_certificate_for_its_purpose_alone(tmp_path, component, purpose, accepted):
    given, _ = issued(component, datetime.now(UTC))
    for name, content in given.items():
        (tmp_path / name).write_bytes(content)
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-verify_hostname", component]
    done = subprocess.run(
        [*command, "-CAfile", tmp_path / "ca.crt", tmp_path / "tls.crt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == accepted, done.stderr


async def shaken_hands(server, client, name=mutual.WORKER):
    """Whether Python's ssl on both ends accepts both certificates."""
    served = tls.server_context(server)
    served.verify_mode = ssl.CERT_REQUIRED
    served.load_verify_locations(cadata=server.authorities.decode())
    asking = ssl.create_default_context(cadata=client.authorities.decode())
    tls.load(asking, client)

    async def answer(reader, writer):
        writer.write(await reader.readline())
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=served)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=asking, server_hostname=name
            )
            writer.write(b"hello\n")
            answered = await reader.readline()
            writer.close()
        except (ssl.SSLError, OSError):
            return False
        return answered == b"hello\n"


async def test_components_of_a_namespace_accept_each_other_and_nobody_else():
    now = datetime.now(UTC)
    known, others = renewal.renewed((), "prod", now), renewal.renewed((), "dev", now)

    def pair(component, authorities=known):
        return mutual.parse(issued(component, now, authorities)[0])

    worker = pair(mutual.WORKER)
    assert await shaken_hands(worker, pair(mutual.FRONTEND))
    assert await shaken_hands(worker, pair(mutual.OPERATOR))
    assert not await shaken_hands(worker, pair(mutual.WORKER))
    assert not await shaken_hands(worker, pair(mutual.FRONTEND, others))
    assert not await shaken_hands(pair(mutual.FRONTEND), pair(mutual.FRONTEND))  # it is no worker


def test_a_certificate_is_renewed_after_two_thirds_of_its_life():
    given, known = issued()
    assert renewal.due(given, mutual.WORKER, known, NOW) == ""
    assert renewal.due(given, mutual.WORKER, known, NOW + LIFE * 2 / 3 - DAY / 12) == ""
    assert "renewal" in renewal.due(given, mutual.WORKER, known, NOW + LIFE * 2 / 3)


@pytest.mark.parametrize("spoil", ["tls.crt", "tls.key", "ca.crt"])
def test_a_secret_that_somebody_spoiled_is_due(spoil):
    given, known = issued()
    for content in (b"", b"-----BEGIN NONSENSE-----", issued(mutual.WORKER)[0][spoil]):
        assert renewal.due({**given, spoil: content}, mutual.WORKER, known, NOW)
    assert renewal.due({}, mutual.WORKER, known, NOW)
    assert renewal.due(given, mutual.FRONTEND, known, NOW) == f"tls.crt is not for {mutual.FRONTEND}"


def verifies(mine, theirs, now):
    certificate = x509.load_pem_x509_certificate(mine["tls.crt"])
    roots = x509.load_pem_x509_certificates(theirs["ca.crt"])
    (issuer,) = (root for root in roots if root.subject == certificate.issuer)
    certificate.verify_directly_issued_by(issuer)
    assert now < certificate.not_valid_after_utc <= issuer.not_valid_after_utc


def test_in_five_years_each_secret_agrees_with_the_one_before_it():
    """Components have one or the other: not all pods get a changed Secret at once."""
    known, held = (), []
    for day in range(0, 5 * 365, 9):
        now = NOW + day * DAY
        known = renewal.renewed(known, "prod", now)
        if not held or renewal.due(held[-1], mutual.WORKER, known, now):
            held.append(issued(mutual.WORKER, now, known)[0])
            for mine, theirs in itertools.product(held[-2:], held[-2:]):
                verifies(mine, theirs, now)
    assert len({secret["ca.crt"] for secret in held}) >= 5, "authorities were replaced"


def test_authorities_survive_being_written_and_what_is_broken_is_left_out():
    known = renewal.renewed((), "prod", NOW)
    known = renewal.renewed(known, "prod", NOW + AUTHORITY_LIFE * 2 / 3)
    assert len(known) == 2
    written = renewal.written(known)
    assert renewal.read(written) == known
    assert renewal.read({**written, "0.key": written["1.key"]}) == known[1:]
    assert renewal.read({"0.crt": b"x", "notes": b"y"}) == ()
    assert renewal.signing(known, NOW + AUTHORITY_LIFE * 2 / 3 + DAY / 2) == known[0]
    assert renewal.signing(known, NOW + AUTHORITY_LIFE * 2 / 3 + 2 * DAY) == known[1]


def test_the_life_of_a_certificate_ends_with_that_of_its_authority():
    authority = new_authority("prod", NOW)
    late = authority.parsed.not_valid_after_utc - DAY
    pair = issue(authority, mutual.WORKER, authority.certificate, late)
    end = x509.load_pem_x509_certificate(pair.certificate).not_valid_after_utc
    assert end == authority.parsed.not_valid_after_utc
    with pytest.raises(ValueError, match="the key is not that of the certificate"):
        _ = Authority(authority.certificate, new_authority("prod", NOW).key).signer


def test_the_text_of_an_object_with_a_key_has_no_key():
    """It may be a part of an error message."""
    authority = new_authority("prod", NOW)
    pair = issue(authority, mutual.OPERATOR, authority.certificate, NOW)
    for one in (authority, pair):
        assert "PRIVATE" not in repr(one)


class Cluster:
    """Secrets, with the versions of an API server."""

    def __init__(self):
        self.secrets, self.writes, self.reads = {}, [], 0

    def read(self, kind, namespace, name):
        self.reads += 1
        return self.secrets.get((namespace, name))

    def create(self, manifest):
        key = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        if key in self.secrets:
            raise ChangedMeanwhileError("conflict")
        self._put(key, manifest)

    def replace(self, manifest):
        key = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        if manifest["metadata"]["resourceVersion"] != self.secrets[key]["metadata"]["resourceVersion"]:
            raise ChangedMeanwhileError("conflict")
        self._put(key, manifest)

    def _put(self, key, manifest):
        self.writes.append(key[1])
        metadata = {**manifest["metadata"], "resourceVersion": str(len(self.writes))}
        self.secrets[key] = {**manifest, "metadata": metadata}

    def files(self, name, namespace="prod"):
        data = self.secrets[namespace, name]["data"]
        return {key: base64.b64decode(text) for key, text in data.items()}


class Time:
    def __init__(self):
        self.passed = timedelta()

    def now(self):
        return NOW + self.passed

    def seconds(self):
        return self.passed.total_seconds()


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def cluster():
    return Cluster()


@pytest.fixture
def certificates(cluster, time):
    return Certificates(cluster, time.now, time.seconds)


ALL = [names.AUTHORITY_SECRET, names.WORKER_CERTIFICATE_SECRET, names.FRONTEND_CERTIFICATE_SECRET]


def test_secrets_are_made_once_and_only_renewed_when_due(certificates, cluster, time):
    assert certificates.identity("prod") is None
    certificates.ensure("prod")
    assert cluster.writes == ALL
    reads = cluster.reads
    certificates.ensure("prod")
    assert cluster.reads == reads, "checked again at once"
    for _ in range(59):
        time.passed += DAY
        certificates.ensure("prod")
    assert cluster.writes == ALL
    own = certificates.identity("prod")
    time.passed += 2 * DAY
    certificates.ensure("prod")
    assert cluster.writes == [*ALL, *ALL[1:]]
    assert certificates.identity("prod") is not own
    assert x509.load_pem_x509_certificate(certificates.identity("prod").certificate)


def test_a_slow_namespace_keeps_no_other_waiting(cluster, certificates):
    asked, released = threading.Event(), threading.Event()

    def read(kind, namespace, name):
        if namespace == "slow":
            asked.set()
            released.wait(150)
        return Cluster.read(cluster, kind, namespace, name)

    cluster.read = read
    slow, quick = (threading.Thread(target=certificates.ensure, args=(name,)) for name in ("slow", "prod"))
    slow.start()
    assert asked.wait(60)
    quick.start()
    quick.join(60)
    done = certificates.identity("prod"), certificates.identity("slow")
    released.set()
    for thread in (slow, quick):
        thread.join(60)
    assert done[0] is not None
    assert done[1] is None
    assert certificates.identity("slow") is not None


def test_a_deleted_or_spoiled_secret_is_made_again(certificates, cluster, time):
    certificates.ensure("prod")
    before = cluster.files(names.FRONTEND_CERTIFICATE_SECRET)
    del cluster.secrets["prod", names.WORKER_CERTIFICATE_SECRET]
    cluster.secrets["prod", names.FRONTEND_CERTIFICATE_SECRET]["data"]["tls.key"] = "???"
    time.passed += timedelta(seconds=CHECKED_S + 1)
    certificates.ensure("prod")
    assert cluster.writes[3:] == ALL[1:]
    after = cluster.files(names.FRONTEND_CERTIFICATE_SECRET)
    assert after["ca.crt"] == before["ca.crt"]
    assert after["tls.key"] != before["tls.key"]


def test_secrets_that_went_with_their_namespace_are_made_as_soon_as_a_pod_needs_them(
    certificates, cluster, time
):
    certificates.ensure("prod")
    cluster.secrets.clear()
    time.passed += timedelta(seconds=10)
    certificates.ensure("prod")
    assert cluster.secrets == {}
    certificates.ensure("prod", needed=True)
    assert {name for _, name in cluster.secrets} == {*ALL}
    reads = cluster.reads
    certificates.ensure("prod", needed=True)
    assert cluster.reads == reads, "at every event of a pod that starts"


def test_an_api_server_that_does_not_answer_is_asked_once_in_a_while(certificates, cluster, time):
    """Each attempt may take the whole limit of a request, in a thread that reconciles."""
    certificates.ensure("prod")
    tries = []

    def read(*name):
        tries.append(name)
        raise ClusterUnavailableError("the webhook did not answer")

    cluster.read = read
    for passed in (CHECKED_S + 1, 1, FAILED_S - 2, 2):
        time.passed += timedelta(seconds=passed)
        with pytest.raises(ClusterUnavailableError, match="the webhook did not answer"):
            certificates.ensure("prod")
    assert len(tries) == 2
    with pytest.raises(ClusterUnavailableError):
        certificates.ensure("new")
    del cluster.read
    time.passed += timedelta(seconds=NEEDED_S)
    certificates.ensure("new")
    time.passed += timedelta(seconds=FAILED_S)
    certificates.ensure("prod")


def test_nobody_waits_for_the_check_of_certificates_that_are_known(certificates, cluster, time):
    certificates.ensure("prod")
    time.passed += timedelta(seconds=CHECKED_S + 1)
    asked, released = threading.Event(), threading.Event()

    def read(*name):
        asked.set()
        released.wait(10)
        return Cluster.read(cluster, *name)

    cluster.read = read
    slow, quick = (threading.Thread(target=certificates.ensure, args=("prod",)) for _ in range(2))
    slow.start()
    assert asked.wait(10)
    quick.start()
    quick.join(5)
    waits = quick.is_alive()
    released.set()
    for thread in (slow, quick):
        thread.join(10)
    assert not waits


def test_a_right_clock_replaces_what_a_wrong_one_made(certificates, cluster, time):
    """Components would refuse it until that time comes."""
    Certificates(cluster, lambda: NOW + 400 * DAY, time.seconds).ensure("prod")
    certificates.ensure("prod")
    for name in ALL[1:]:
        made = cluster.files(name)
        chain = [*x509.load_pem_x509_certificates(made["ca.crt"] + made["tls.crt"])]
        assert len(chain) == 2
        assert all(one.not_valid_before_utc <= NOW < one.not_valid_after_utc for one in chain)


def test_a_certificate_that_is_not_valid_yet_is_due():
    known = renewal.renewed((), "prod", NOW)
    early = files(issue(known[0], mutual.WORKER, renewal.bundle(known), NOW + 2 * DAY))
    assert "renewal" in renewal.due(early, mutual.WORKER, known, NOW)


def test_another_process_takes_the_secrets_over_as_they_are(certificates, cluster, time):
    certificates.ensure("prod")
    other = Certificates(cluster, time.now, time.seconds)
    other.ensure("prod")
    assert cluster.writes == ALL
    assert other.identity("prod").authorities == certificates.identity("prod").authorities


def test_namespaces_have_authorities_of_their_own_and_pods_never_get_the_key(certificates, cluster):
    certificates.ensure("prod")
    certificates.ensure("dev")
    assert cluster.files(ALL[1])["ca.crt"] != cluster.files(ALL[1], "dev")["ca.crt"]
    for name in ALL[1:]:
        assert sorted(cluster.files(name)) == ["ca.crt", "tls.crt", "tls.key"]
        assert cluster.secrets["prod", name]["type"] == "kubernetes.io/tls"


def test_a_secret_of_somebody_else_is_left_alone(certificates, cluster):
    theirs = {"metadata": {"name": ALL[1], "namespace": "prod", "resourceVersion": "7"}, "data": {}}
    cluster.secrets["prod", ALL[1]] = theirs
    with pytest.raises(ApplyRefusedError, match=r"is not the operator's: .*; rename the Secret"):
        certificates.ensure("prod")
    assert cluster.secrets["prod", ALL[1]] is theirs
