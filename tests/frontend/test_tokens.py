"""Tokens of an identity provider: which are accepted, whose they are, and how its keys are fetched."""

import asyncio
import base64
import contextlib
import hmac
import json
import time
import warnings

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, OKPKey, RSAKey

from moe_frontend.edges import Guards
from moe_frontend.identity import provider
from moe_frontend.identity.caller import Caller
from moe_frontend.identity.credentials import RefusedError
from moe_frontend.identity.provider import FileSource, KeySetError, UrlSource, check_url
from moe_frontend.identity.tokens import TokenVerifier, Trust
from tests.frontend.http.conftest import http  # noqa: F401 - a fixture
from tests.pki import mount

ISSUER, AUDIENCE = "https://idp.example", "moe"
RSA = RSAKey.generate_key(2048, {"kid": "rsa"})
EC = ECKey.generate_key("P-256", {"kid": "ec"})
OKP = OKPKey.generate_key("Ed25519", {"kid": "okp"})
TRUST = Trust(ISSUER, AUDIENCE, "tenant")


def key_set(*keys):
    return json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()


def claims(**changed):
    now = int(time.time())
    given_ = {"iss": ISSUER, "aud": AUDIENCE, "exp": now + 600, "iat": now, "sub": "ann", "tenant": "team-a"}
    return {name: value for name, value in (given_ | changed).items() if value is not None}


def signed(key=EC, alg="ES256", header=None, **changed):
    header = {"alg": alg, "kid": key.kid, **(header or {})}
    header = {name: value for name, value in header.items() if value is not None}
    return jwt.encode(header, claims(**changed), key, algorithms=[alg])


def part(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def verifier(*keys):
    known = provider.parse(key_set(*(keys or (RSA, EC, OKP))))
    return TokenVerifier(TRUST, FileSource(lambda: known))


@pytest.mark.parametrize(
    ("key", "alg"),
    [(RSA, "RS256"), (RSA, "PS384"), (EC, "ES256"), (OKP, "Ed25519")],
    ids=lambda x: str(x)[:9],
)
async def test_a_valid_token_names_its_tenant(key, alg):
    assert await verifier().caller(signed(key, alg)) == Caller("team-a", "ann")


async def test_one_of_several_audiences_and_no_name_of_the_only_key_are_accepted():
    token = signed(header={"kid": None}, aud=["other", AUDIENCE])
    assert (await verifier(EC).caller(token)).tenant == "team-a"
    with pytest.raises(RefusedError, match=r"its key \(kid\) is not one of"):
        await verifier().caller(token)


def confused():
    """Signed with the public key as the secret of HMAC (CVE-2015-9235 and its kin)."""
    signed_part = f"{part({'alg': 'HS256', 'kid': 'rsa'})}.{part(claims())}"
    mac = hmac.digest(RSA.as_pem(private=False), signed_part.encode(), "sha256")
    return f"{signed_part}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


with warnings.catch_warnings(action="ignore"):
    SMALL = key_set(RSAKey.generate_key(1024))
FORGED = ECKey.generate_key("P-256", {"kid": "ec"})


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (lambda: signed(exp=int(time.time()) - 60), "it has expired; get a new one"),
        (lambda: signed(exp=None), "it has no exp; get one that names it"),
        (lambda: signed(exp=float("nan")), "its exp is not accepted"),
        (lambda: signed(exp="never"), "its exp is not accepted"),
        (lambda: signed(nbf=int(time.time()) + 600), "its nbf is not accepted"),
        (lambda: signed(iss="https://evil.example"), f"its iss is not accepted; get one for '{ISSUER}'"),
        (lambda: signed(iss=None), "it has no iss"),
        (lambda: signed(aud="other"), f"its aud is not accepted; get one for '{AUDIENCE}'"),
        (lambda: signed(aud=["a", "b"]), "its aud is not accepted"),
        (lambda: signed(aud=None), "it has no aud"),
        (lambda: signed(FORGED), "its form or its signature is wrong"),
        (lambda: signed() + "x", "its form or its signature is wrong"),
        (confused, "its alg is not accepted; use one of RS256"),
        (lambda: f"{part({'alg': 'none', 'kid': 'ec'})}.{part(claims())}.", "its alg is not accepted"),
        (
            lambda: f"{part({'alg': 'ES256', 'kid': 'rsa'})}.{part(claims())}.AAAA",
            "its form or its signature",
        ),
        (lambda: signed(header={"kid": "invented"}), r"its key (kid) is not one of"),
        (lambda: f"{part({'alg': 'ES256', 'kid': 7})}.{part({})}.AAAA", "token is not valid"),
        (lambda: f"{part({'alg': ['ES256']})}.{part({})}.AAAA", "token is not valid"),
        (lambda: f"{part([])}.{part({})}.AAAA", "token is not valid"),
        (
            lambda: f"{part({'alg': 'ES256', 'crit': ['x'], 'x': 1, 'kid': 'ec'})}.e30.AAAA",
            "token is not valid",
        ),
        (lambda: part({"alg": "ES256", "junk": "x" * 4000}) + ".e30.AAAA", "token is not valid"),
        (lambda: "e" * 8000, "token is not valid"),
        (lambda: base64.urlsafe_b64encode(b"[" * 1500).decode() + ".e30.AAAA", "token is not valid"),
        (lambda: signed(tenant=None), "token names no tenant: its claim 'tenant' must be"),
        (lambda: signed(tenant="a b"), "token names no tenant"),
        (lambda: signed(tenant=["a"]), "token names no tenant"),
        (lambda: signed(tenant=""), "token names no tenant"),
    ],
)
async def test_a_token_that_proves_nothing_is_refused_with_a_sentence(token, sentence):
    with pytest.raises(RefusedError) as caught:
        await verifier().caller(token())
    assert sentence in str(caught.value)
    assert caught.value.status.code == grpc.StatusCode.UNAUTHENTICATED.value[0]


@given(st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), max_size=200))
def test_whatever_a_client_sends_is_at_most_refused(text):
    checked = verifier(EC)
    for token in (
        text,
        f"{text}.{text}.{text}",
        signed() + text,
        f"{part({'alg': text, 'kid': text})}.{text}.a",
    ):
        with contextlib.suppress(RefusedError):
            asyncio.run(checked.caller(token))


async def test_frontends_verify_tokens_of_a_mounted_key_set(http, tmp_path):  # noqa: F811
    mount(tmp_path / "jwks", {"jwks.json": key_set(EC)})
    guards = Guards(
        jwks=str(tmp_path / "jwks"), jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_tenant_claim="tenant"
    )
    h = await http(workers=1, guards=guards)
    assert await h.bench.text("count 1", metadata=(("authorization", f"Bearer {signed()}"),))
    headers = {"authorization": f"bearer {signed(tenant='team-b')}"}
    answer = await h.client.post("/v1/completions", json={"prompt": "count 1"}, headers=headers)
    assert answer.status_code == 200
    assert [seen["x-moe-tenant"] for seen in h.bench.workers[0].metadata] == ["team-a", "team-b"]
    answer = await h.client.get("/v1/models", headers={"authorization": f"Bearer {signed(aud='other')}"})
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{", "no JSON Web Key Set"),
        (b"[]", "no JSON Web Key Set"),
        (b"[" * 100_000, "no JSON Web Key Set"),
        (b'{"keys": {}}', "must be a list of at most 100"),
        (json.dumps({"keys": [{}] * 101}).encode(), "must be a list of at most 100"),
        (b" " * (2**20 + 1), "larger than 1048576 bytes"),
        (b'{"keys": []}', "has no key that verifies signatures"),
        (
            b'{"keys": [1, null, {"kty": "RSA"}, {"kty": "EC", "crv": "P-256", "x": "a", "y": "b"}]}',
            "has no key",
        ),
        (
            b'{"keys": [{"kty": "oct", "k": "c2hhcmVkIHdpdGggZXZlcnlib2R5IHdobyBhc2tz"}]}',
            "has no key that verifies",
        ),
        (json.dumps({"keys": [EC.as_dict(private=False, use="enc")]}).encode(), "has no key that verifies"),
        (SMALL, "has no key that verifies signatures; use RSA of 2048"),
    ],
)
def test_a_key_set_that_verifies_nothing_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        provider.parse(text)


@pytest.mark.parametrize(
    "url",
    [
        "http://idp.example/jwks",
        "https://",
        "ftp://idp.example",
        "https://a:b@idp.example/",
        "https://x/ y",
        "file:/etc",
    ],
)
def test_keys_come_over_https_only(url):
    with pytest.raises(ValueError, match=r"is no URL of keys"):
        check_url(url)


class Provider:
    """Answers as it is told, on loopback."""

    def __init__(self):
        self.body = key_set(EC)
        self.head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        self.length = None
        self.pause_s = 0.0
        self.asked = 0

    async def __call__(self, reader, writer):
        self.asked += 1
        await reader.readuntil(b"\r\n\r\n")
        length = len(self.body) if self.length is None else self.length
        with contextlib.suppress(ConnectionError):
            for piece in (self.head, f"Content-Length: {length}\r\n\r\n".encode(), self.body):
                for at in range(0, len(piece), 16 if self.pause_s else len(piece)):
                    writer.write(piece[at : at + 16] if self.pause_s else piece)
                    await writer.drain()
                    await asyncio.sleep(self.pause_s)
            writer.close()


@pytest.fixture
async def idp():
    told = Provider()
    server = await asyncio.start_server(told, "127.0.0.1", 0)
    told.url = check_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks?v=1")
    yield told
    server.close()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pause_s": 0.2}, "did not answer with a whole key set within 1 s"),
        ({"length": 5000}, "cannot be fetched"),
        ({"length": 20}, "is not valid: it is no JSON Web Key Set"),
        ({"length": 2**40, "body": b" " * (2**20 + 70_000)}, "is not valid: it is larger than 1048576 bytes"),
        (
            {"head": b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n"},
            "answers with 302 instead of 200",
        ),
        ({"head": b"HTTP/1.1 500 Oh\r\n"}, "answers with 500"),
        ({"head": b"SMTP\r\n"}, "cannot be fetched"),
        ({"head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n"}, "cannot be fetched"),
        ({"body": b"<html>"}, "is not valid: it is no JSON Web Key Set"),
    ],
)
async def test_a_provider_that_stalls_or_lies_is_an_error_with_a_sentence(idp, monkeypatch, change, sentence):
    monkeypatch.setattr(provider, "FETCH_S", 1.0)
    for name, value in change.items():
        setattr(idp, name, value)
    with pytest.raises(KeySetError, match=sentence):
        await provider.fetch(idp.url)


async def test_a_provider_that_is_not_there_is_an_error():
    with pytest.raises(KeySetError, match=r"cannot be fetched"):
        await provider.fetch("http://127.0.0.1:9/")


async def test_a_rotated_key_is_fetched_once_it_is_used_and_invented_names_are_not(idp):
    now = [0.0]
    source = UrlSource(idp.url, lambda: now[0])
    running = asyncio.create_task(source.run())
    checked = TokenVerifier(TRUST, source)
    async with asyncio.timeout(60):
        while not idp.asked or source._keys is None:
            await asyncio.sleep(0.01)
        assert (await checked.caller(signed())).tenant == "team-a"
        for number in range(20):
            with pytest.raises(RefusedError, match=r"\(kid\)"):
                await checked.caller(signed(header={"kid": f"invented-{number}"}))
        assert idp.asked == 1
        idp.body, now[0] = key_set(RSA), 11.0
        # Those that come while the keys are fetched wait for them too.
        found = await asyncio.gather(*(checked.caller(signed(RSA, "RS256")) for _ in range(3)))
        assert [caller.tenant for caller in found] == ["team-a"] * 3
        with pytest.raises(RefusedError):
            await checked.caller(signed())  # its key was taken back
    assert idp.asked == 2
    running.cancel()


async def test_until_the_keys_are_known_the_answer_is_unavailable_and_then_the_last_ones_hold_for_an_hour(
    idp,
):
    now = [0.0]
    idp.body, good = b"", idp.body
    source = UrlSource(idp.url, lambda: now[0])
    running = asyncio.create_task(source.run())
    checked = TokenVerifier(TRUST, source)
    async with asyncio.timeout(60):
        while not idp.asked:
            await asyncio.sleep(0.01)
        with pytest.raises(RefusedError, match=r"keys are not known yet; try later") as caught:
            await checked.caller(signed())
        assert caught.value.status.code == grpc.StatusCode.UNAVAILABLE.value[0]
        idp.body, now[0] = good, 11.0
        assert (await checked.caller(signed())).tenant == "team-a"
        idp.body, now[0] = b"", 22.0
        with pytest.raises(RefusedError, match=r"\(kid\)"):
            await checked.caller(signed(RSA, "RS256"))
        assert (await checked.caller(signed())).tenant == "team-a"
        now[0] = 11.0 + provider.KEPT_S - 1
        assert (await checked.caller(signed())).tenant == "team-a"
        now[0] = 11.0 + provider.KEPT_S  # a withdrawn key would be accepted for ever
        with pytest.raises(RefusedError, match=r"keys are not known any more; try later") as caught:
            await checked.caller(signed())
        assert caught.value.status.code == grpc.StatusCode.UNAVAILABLE.value[0]
        idp.body, now[0] = good, now[0] + 20.0
        assert (await checked.caller(signed())).tenant == "team-a"
    running.cancel()
