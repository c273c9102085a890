"""Container output in the log format that the kubelet reads: `TIME STREAM P|F TEXT`, a record a line.

Format: github.com/kubernetes/design-proposals-archive, node/kubelet-cri-logging.md.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

MAX_LINE = 16 * 1024  # bytes; containerd's limit, longer lines become several partial records
_READ = 64 * 1024


def timestamp(nanoseconds: int) -> str:
    """RFC 3339 in UTC with nanoseconds."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"


class LineSplitter:
    """Cuts one stream into records; keeps an unfinished line until its rest, or the end, comes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[bool, bytes]]:
        """Yields (is the end of a line, text without newline) for what `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            *parts, last = _cut(line)
            yield from ((False, part) for part in parts)
            yield True, last
        while len(self._rest) >= MAX_LINE:
            yield False, self._rest[:MAX_LINE]
            self._rest = self._rest[MAX_LINE:]

    def end(self) -> Iterator[tuple[bool, bytes]]:
        """Yields a last line that has no newline."""
        if self._rest:
            yield True, self._rest
        self._rest = b""


def _cut(line: bytes) -> list[bytes]:
    return [line[i : i + MAX_LINE] for i in range(0, len(line), MAX_LINE)] or [b""]


class LogFile:
    """A container's log on the node; survives being renamed away (rotation) by `reopen`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = self._open()

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def reopen(self) -> None:
        """Goes on in a new file of the same name."""
        os.close(self._descriptor)
        self._descriptor = self._open()

    def write(self, stream: str, records: Iterator[tuple[bool, bytes]]) -> None:
        """Appends records of one stream ("stdout" or "stderr")."""
        head = f"{timestamp(time.time_ns())} {stream} ".encode()
        content = b"".join(head + (b"F " if full else b"P ") + text + b"\n" for full, text in records)
        if content:
            os.write(self._descriptor, content)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


class Pump:
    """Moves what a container writes to one pipe into its log, as it comes."""

    def __init__(self, descriptor: int, stream: str, log: LogFile) -> None:
        self._descriptor, self._stream, self._log = descriptor, stream, log
        self._splitter = LineSplitter()
        os.set_blocking(descriptor, False)
        asyncio.get_running_loop().add_reader(descriptor, self._read)
        self._open = True

    def _read(self) -> bool:
        """Reads once; returns whether there may be more at once."""
        try:
            data = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return False
        if not data:
            self._close()
            return False
        self._log.write(self._stream, self._splitter.feed(data))
        return True

    def _close(self) -> None:
        self._open = False
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._log.write(self._stream, self._splitter.end())

    def finish(self) -> None:
        """Takes what is still in the pipe of a container that has ended, and closes it."""
        while self._open and self._read():
            pass
        if self._open:
            self._close()
