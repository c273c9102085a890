"""The cluster's DNS server: A records of services and StatefulSet pods, over UDP and TCP (RFC 1035, RFC
7766).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import cast

from localcluster.layout import CLUSTER_DOMAIN, DNS_ADDRESS

_TTL = 1  # seconds; a restarted pod has a new address, and a query here costs a tenth of a millisecond
_A, _ANY, _IN = 1, 255, 1
_OK, _FORMAT_ERROR, _NO_NAME, _NOT_IMPLEMENTED, _REFUSED = 0, 1, 3, 4, 5
_QUESTION_POINTER = 0xC00C  # compression: "the name at offset 12", which is the question's
_HEADER = struct.Struct("!HHHHHH")
# The most A records of 16 bytes that fit into a UDP answer of 512 bytes with a header and a name of 255.
_MAX_ADDRESSES = 14

Lookup = Callable[[str], "tuple[IPv4Address, ...] | None"]


@dataclass(frozen=True)
class Question:
    """A parsed query: its id and flags, the name (lower case, no final dot), the type, and the question's own
    bytes.
    """

    id: int
    flags: int
    name: str
    kind: int
    raw: bytes


def parse(query: bytes) -> Question:
    """Reads a query with one question; raises ValueError on anything else."""
    if len(query) < _HEADER.size:
        raise ValueError("shorter than a DNS header")
    identity, flags, questions, *_ = _HEADER.unpack_from(query)
    if questions != 1 or flags & 0x8000:
        raise ValueError("not a query with one question")
    labels, position = [], _HEADER.size
    while True:
        if position >= len(query):
            raise ValueError("the name does not end")
        length = query[position]
        if length == 0:
            break
        label = query[position + 1 : position + 1 + length]
        if length > 63 or len(label) != length:
            raise ValueError("a label that is too long, or a compressed one")
        labels.append(label.decode("ascii", "backslashreplace").lower())
        position += 1 + length
    end = position + 5
    if len(query) < end:
        raise ValueError("no type and class after the name")
    kind, _ = struct.unpack_from("!HH", query, position + 1)
    return Question(identity, flags, ".".join(labels), kind, query[_HEADER.size : end])


def answer(query: bytes, lookup: Lookup) -> bytes:
    """The answer to a query, or nothing if the query has no id.

    Args:
        query: the message.
        lookup: addresses of a name; None where the name does not exist.
    """
    try:
        question = parse(query)
    except ValueError:
        return (
            _HEADER.pack(int.from_bytes(query[:2]), 0x8000 | _FORMAT_ERROR, 0, 0, 0, 0)
            if len(query) >= 2
            else b""
        )
    if question.flags & 0x7800:  # an opcode other than QUERY
        return _message(question, _NOT_IMPLEMENTED, ())
    if not question.name.endswith(f".{CLUSTER_DOMAIN}"):
        # No other names exist for pods, and "no such name" lets a resolver try its next search domain.
        return _message(question, _NO_NAME, ())
    addresses = lookup(question.name)
    if addresses is None:
        return _message(question, _NO_NAME, ())
    return _message(question, _OK, addresses if question.kind in (_A, _ANY) else ())


def _message(question: Question, code: int, addresses: tuple[IPv4Address, ...]) -> bytes:
    # Response, authoritative, recursion desired as asked, recursion available (glibc wants it).
    flags = 0x8480 | (question.flags & 0x0100) | code
    shown = addresses[:_MAX_ADDRESSES]
    head = _HEADER.pack(question.id, flags, 1, len(shown), 0, 0)
    records = (struct.pack("!HHHIH", _QUESTION_POINTER, _A, _IN, _TTL, 4) + a.packed for a in shown)
    return head + question.raw + b"".join(records)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because the event loop's own class does not inherit from DatagramTransport before Python
        # 3.12.
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        reply = answer(data, self._lookup)
        if reply:
            self._transport.sendto(reply, addr)


async def serve(lookup: Lookup, host: str = str(DNS_ADDRESS), port: int = 53) -> None:
    """Starts serving; returns when both sockets are bound."""

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                reply = answer(await reader.readexactly(length), lookup)
                writer.write(struct.pack("!H", len(reply)) + reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Datagrams(lookup), local_addr=(host, port)
    )
    await asyncio.start_server(stream, host, port)
