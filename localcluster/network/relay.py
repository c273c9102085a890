"""Relays TCP connections, byte for byte, to a backend that is selected for each connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from localcluster.network.catalog import Address

_CHUNK = 256 * 1024
_CONNECT_TIMEOUT = 5.0  # seconds; everything is on this machine

Choose = Callable[[], Sequence[Address]]


class RoundRobin:
    """Orders backends so that each call begins with the next one."""

    def __init__(self, backends: Choose) -> None:
        self._backends = backends
        self._turn = 0

    def __call__(self) -> Sequence[Address]:
        """All ready backends, in round-robin order."""
        found = self._backends()
        self._turn += 1
        start = self._turn % len(found) if found else 0
        return [*found[start:], *found[:start]]


async def _connect(candidates: Sequence[Address]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    for address in candidates:
        with contextlib.suppress(OSError, TimeoutError):
            return await asyncio.wait_for(
                asyncio.open_connection(address.host, address.port), _CONNECT_TIMEOUT
            )
    return None


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until the end, and then says so to the other side, which may still have something to send."""
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except (ConnectionError, OSError):
        # One side has gone: abort the other, so that it learns of it.
        writer.transport.abort()


def handler(
    choose: Choose, refused: Callable[[], None] = lambda: None
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]:
    """A callback for asyncio.start_server; without a ready backend it resets the connection, as kube-proxy
    rejects it, and calls `refused`.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await _connect(choose())
        if upstream is None:
            refused()
            writer.transport.abort()
            return
        for each in (writer, upstream[1]):
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.gather(_copy(reader, upstream[1]), _copy(upstream[0], writer))
        finally:
            upstream[1].close()
            writer.close()

    return serve
