"""What separates clients in caches and indexes that they share. Pure."""

import hashlib
from collections.abc import Iterable
from typing import Any, Final

_CREDENTIALS: Final = ("authorization", "x-cache-salt")
"""Clients with other credentials, or another salt of their own, share nothing."""


def salt_of(metadata: Iterable[Any]) -> bytes:
    """32 bytes that are equal for equal credentials and salts; metadata keys are in lower case."""
    pairs = list(metadata)
    digest = hashlib.sha256()
    for name in _CREDENTIALS:
        for key, value in pairs:
            if key == name:
                part = value if isinstance(value, bytes) else str(value).encode()
                digest.update(f"{name}:{len(part)}:".encode() + part)
    return digest.digest()
