"""What separates clients in caches and indexes that they share. Pure."""

import hashlib
from collections.abc import Iterable
from typing import Any, Final

_CREDENTIALS: Final = "authorization"
_OWN: Final = "x-cache-salt"
_HEX: Final = 32


def salt_of(metadata: Iterable[Any], tenant: str = "") -> bytes:
    """32 bytes that are equal for equal clients, and for equal salts of their own.

    Clients are told apart by tenant, or by credentials where the tenant is not known. Metadata keys are in
    lower case.
    """
    digest = hashlib.sha256()
    for part in _parts(metadata, tenant):
        digest.update(part)
    return digest.digest()


def prefix_salt(metadata: Iterable[Any], tenant: str = "") -> str:
    """The same for prefix caches of workers, in hexadecimal; "" for clients that nothing tells apart."""
    pairs = list(metadata)
    return salt_of(pairs, tenant).hex()[:_HEX] if _parts(pairs, tenant) else ""


def _parts(metadata: Iterable[Any], tenant: str) -> list[bytes]:
    pairs = list(metadata)
    who = [("tenant", tenant)] if tenant else [pair for pair in pairs if pair[0] == _CREDENTIALS]
    return [_framed(key, value) for key, value in [*who, *(pair for pair in pairs if pair[0] == _OWN)]]


def _framed(key: str, value: str | bytes) -> bytes:
    part = value if isinstance(value, bytes) else value.encode()
    return f"{key}:{len(part)}:".encode() + part
