"""The public keys of an identity provider: a JSON Web Key Set (RFC 7517), from a mounted file or a URL.

A provider rotates its keys: it publishes the next one first, then signs with it. Keys from a URL are fetched
every five minutes, and at once when a token names a key that is not known (but not more often than every
ten seconds, so that invented names do not reach the provider). Each set replaces the one before, so a key
that the provider withdrew is accepted no more. While the provider cannot be reached, the last keys stay in
force for an hour: whoever can keep the provider from answering must not keep a withdrawn key alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import grpc
import h11
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, JWKRegistry, OKPKey, RSAKey

from moe_api import rich_status
from moe_frontend.identity.credentials import RefusedError

_LOG: Final = logging.getLogger(__name__)
KEYS_MOST: Final = 100
BYTES_MOST: Final = 2**20
RSA_BITS_LEAST: Final = 2048
FETCH_S: Final = 10.0
REFRESH_S: Final = 300.0
COOL_S: Final = 10.0
KEPT_S: Final = 3600.0
"""Seconds for which keys are accepted after they were fetched."""
_RETRY_S: Final = 1.0
PublicKey = RSAKey | ECKey | OKPKey


class KeySetError(Exception):
    """A key set cannot be fetched or is not valid."""


class Keys:
    """The keys of one set that verify signatures."""

    def __init__(self, keys: list[PublicKey]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, kid: str | None) -> PublicKey | None:
        """The key of this name; without a name, the only key."""
        if kid is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.kid == kid), None)


class Source(Protocol):
    """Where keys come from."""

    async def find(self, kid: str | None) -> PublicKey | None:
        """The key of this name, or None. Raises RefusedError if no keys are known yet."""


def parse(text: bytes) -> Keys:
    """The keys of a JSON Web Key Set. Symmetric keys and keys for encryption are left out: they verify
    nothing.

    Raises:
        ValueError: it is no such set, or it has no key that verifies signatures.
    """
    if len(text) > BYTES_MOST:
        raise ValueError(f"the key set is larger than {BYTES_MOST} bytes")
    try:
        entries = json.loads(text)["keys"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError('it is no JSON Web Key Set; it must be a JSON object with a list "keys"') from error
    if not isinstance(entries, list) or len(entries) > KEYS_MOST:
        raise ValueError(f'"keys" must be a list of at most {KEYS_MOST} keys')
    keys = [key for key in map(_key, entries) if key is not None]
    if not keys:
        raise ValueError(
            f"it has no key that verifies signatures; use RSA of {RSA_BITS_LEAST} bits or more, EC or OKP"
        )
    return Keys(keys)


def _key(entry: Any) -> PublicKey | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    try:
        key = JWKRegistry.import_key(entry)
        raw = getattr(key, "public_key", None)
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    if isinstance(key, RSAKey):
        return key if isinstance(raw, RSAPublicKey) and raw.key_size >= RSA_BITS_LEAST else None
    return key if isinstance(key, ECKey | OKPKey) else None


def parse_file(files: Mapping[str, bytes]) -> Keys:
    """The keys in a mounted Secret or ConfigMap: in its file ``jwks.json``. Raises ValueError."""
    if "jwks.json" not in files:
        raise ValueError("it has no jwks.json; store the JSON Web Key Set under this name")
    return parse(files["jwks.json"])


class FileSource:
    """Keys of a mounted file.

    current: the keys as they are now (`Mounted.value`).
    """

    def __init__(self, current: Callable[[], Keys]) -> None:
        self._current = current

    async def find(self, kid: str | None) -> PublicKey | None:
        """The key of this name, or None."""
        return self._current().find(kid)


class UrlSource:
    """Keys of a URL. `run` fetches them and never returns.

    clock: seconds, monotonic.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._keys: Keys | None = None
        self._fetched_at = 0.0
        self._wanted = asyncio.Event()
        self._fetched = asyncio.Event()
        self._asked_at = -COOL_S
        self._asking = True

    async def run(self) -> None:
        """Fetches the keys now, and again when it is time or somebody waits."""
        failures = 0
        while True:
            self._wanted.clear()
            self._asking, self._asked_at = True, self._clock()
            try:
                self._keys, failures = await fetch(self._url), 0
                self._fetched_at = self._asked_at
            except KeySetError as error:
                failures += 1
                _LOG.log(logging.ERROR if failures == 1 else logging.DEBUG, "%s; trying again", error)
            self._asking = False
            self._fetched.set()
            self._fetched = asyncio.Event()
            pause_s = REFRESH_S if not failures else min(_RETRY_S * 2.0**failures, REFRESH_S / 5)
            await self._pause(pause_s)

    async def _pause(self, pause_s: float) -> None:
        try:
            await asyncio.wait_for(self._wanted.wait(), pause_s)
        except TimeoutError:
            return

    async def find(self, kid: str | None) -> PublicKey | None:
        """The key of this name, or None. Raises RefusedError if no keys are known yet."""
        known = self._valid()
        found = None if known is None else known.find(kid)
        if found is not None:
            return found
        if self._clock() - self._asked_at >= COOL_S:
            self._asking, self._asked_at = True, self._clock()
            self._wanted.set()
        if self._asking:
            with contextlib.suppress(TimeoutError):  # then the keys that are known hold
                await asyncio.wait_for(self._fetched.wait(), FETCH_S)
        known = self._valid()
        if known is None:
            when = "yet" if self._keys is None else "any more"
            sentence = (
                f"tokens cannot be verified: the identity provider's keys are not known {when}; try later"
            )
            raise RefusedError(rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, sentence, _RETRY_S))
        return known.find(kid)

    def _valid(self) -> Keys | None:
        """The keys, unless there are none or they are too old."""
        return self._keys if self._clock() - self._fetched_at < KEPT_S else None


def check_url(url: str) -> str:
    """The URL of a key set.

    Raises:
        ValueError: it is not HTTPS; plain HTTP is for loopback, where nobody is in between.
    """
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise ValueError(f"{url!r} is no URL of keys; it must begin with https:// and a host")
    if parts.username is not None or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"{url!r} is no URL of keys; use ASCII, without spaces and without a password")
    return url


async def fetch(url: str) -> Keys:
    """The keys behind a URL, within ten seconds and one mebibyte.

    Raises:
        KeySetError: they cannot be had; the text says why.
    """
    try:
        async with asyncio.timeout(FETCH_S):
            return parse(await _get(url))
    except TimeoutError:
        raise KeySetError(f"{url} did not answer with a whole key set within {FETCH_S:g} s") from None
    except (OSError, EOFError, h11.RemoteProtocolError) as error:
        raise KeySetError(f"{url} cannot be fetched: {error or type(error).__name__}") from error
    except ValueError as error:
        raise KeySetError(f"{url} is not valid: {error}") from error


async def _get(url: str) -> bytes:
    """The body of a URL, by one request on a connection of its own; redirects are not followed."""
    parts = urllib.parse.urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    context = ssl.create_default_context() if secure else None
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
    try:
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = [("Host", parts.netloc), ("Accept", "application/json"), ("Connection", "close")]
        writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        return await _body(connection, reader)
    finally:
        writer.close()


async def _body(connection: h11.Connection, reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response) and event.status_code != 200:
            raise ValueError(f"it answers with {event.status_code} instead of 200")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BYTES_MOST:
                raise ValueError(f"it is larger than {BYTES_MOST} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise EOFError("the connection was closed before the end")
