"""API keys: only their digests are known. Pure.

A Secret holds an entry for each tenant: its name is the tenant's, and each line of its value is the digest of
    one key, ``sha256:`` and 64 hexadecimal digits, and optionally a name of that key. A tenant with two lines
    can change its key without a pause.

SHA-256 without a salt is enough for keys of 128 random bits or more, which nobody can guess; `moe key` makes
such.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from moe_frontend.identity.caller import TENANT_FORM, Caller, is_tenant

KEYS_MOST: Final = 20_000
_LINE: Final = re.compile(r"sha256:([0-9a-fA-F]{64})(?:[ \t]+([!-~][ -~]{0,127}))?")
_FORM: Final = "write sha256: and 64 hexadecimal digits on each line, then a space and a name if you like"


def digest_of(key: str) -> bytes:
    """SHA-256 of a key, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True)
class _Known:
    digest: bytes
    caller: Caller


class ApiKeys:
    """Known keys, by their digests.

    The search tells nothing about the digests of other keys by its time: the index is a MAC of the digest
        under a random secret of this process, and the digest it finds is compared in constant time.
    """

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        self._secret = secrets.token_bytes(32)
        self._known = {self._index(digest): _Known(digest, caller) for digest, caller in callers.items()}

    def __len__(self) -> int:
        return len(self._known)

    def caller(self, key: str) -> Caller | None:
        """Whose key this is; None if nobody's."""
        digest = digest_of(key)
        found = self._known.get(self._index(digest))
        same = hmac.compare_digest(digest if found is None else found.digest, digest)
        return found.caller if found is not None and same else None

    def _index(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=16).digest()


def parse(files: Mapping[str, bytes]) -> ApiKeys:
    """The keys in the entries of a Secret.

    Raises:
        ValueError: an entry or a line has another form; the text says which one, without quoting it.
    """
    callers: dict[bytes, Caller] = {}
    for tenant, content in files.items():
        if not is_tenant(tenant):
            raise ValueError(f"entry {tenant[:80]!r} names no tenant; use {TENANT_FORM}")
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            digest, name = _parse_line(line.strip(), f"entry {tenant!r}, line {number}")
            if digest in callers:
                raise ValueError(f"entry {tenant!r}, line {number} repeats a key; give each key once")
            callers[digest] = Caller(tenant, name)
    if len(callers) > KEYS_MOST:
        raise ValueError(f"there are {len(callers)} keys; {KEYS_MOST} is the most")
    return ApiKeys(callers)


def _parse_line(line: str, where: str) -> tuple[bytes, str]:
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"{where} is not the digest of a key; {_FORM}")
    return bytes.fromhex(found[1]), found[2] or ""
