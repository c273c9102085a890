"""Which metadata pass between clients and workers: named keys only.

Clients send credentials and proxies add what concerns them; none of it is a worker's business. The W3C trace
context is not in the list: each hop writes its own (moe_api.telemetry).
"""

from collections.abc import Iterable
from typing import Any, Final

from moe_api import tenancy

Pairs = tuple[tuple[str, str | bytes], ...]

DEFAULT_KEYS: Final = frozenset({"x-request-id"})

NEVER: Final = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie", *tenancy.KEYS})
"""Credentials of the client, and what only frontends say; not to be named as keys to forward."""

_ID_MOST: Final = 128
_HOP: Final = frozenset({"user-agent", "content-type", "te", "host", "traceparent", "tracestate"})
_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


def parse_keys(text: str) -> frozenset[str]:
    """The keys in a list with commas between them; an empty text gives none.

    Raises:
        ValueError: a key that gRPC does not allow, or that is never forwarded.
    """
    keys = frozenset(part.strip().lower() for part in text.split(",") if part.strip())
    for key in sorted(keys):
        if not _LETTERS.issuperset(key):
            raise ValueError(f"{key!r} is not a metadata key: use letters, digits, '-', '_' and '.'")
        if key in NEVER or key in _HOP or key.startswith("grpc-"):
            raise ValueError(f"{key!r} is never forwarded: it belongs to one connection or one client")
    return keys


def selected(metadata: Iterable[Any] | None, keys: frozenset[str]) -> Pairs:
    """The pairs with these keys, of values that gRPC sends: bytes under ``-bin`` keys, else printable ASCII.

    It receives others, but fails a call that is to send them on.
    """
    return tuple((key, value) for key, value in metadata or () if key in keys and _may_be_sent(key, value))


def request_id(metadata: Iterable[Any] | None) -> str:
    """The client's name for its request, bounded; "" if it gave none."""
    given = (value for key, value in metadata or () if key == "x-request-id" and _may_be_sent(key, value))
    return str(next(given, ""))[:_ID_MOST]


def _may_be_sent(key: str, value: str | bytes) -> bool:
    if key.endswith("-bin"):
        return isinstance(value, bytes)
    return isinstance(value, str) and value.isascii() and value.isprintable()
