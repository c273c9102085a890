"""Writes the lines of the audit log in a thread: a reader that stops or goes costs no request its time."""

import contextlib
import logging
import os
import queue
import threading
import time
from typing import Final

from opentelemetry import metrics

from moe_api.supervision import Supervisor

_LOG: Final = logging.getLogger(__name__)
LINES_MOST: Final = 10_000
"""Lines that may wait for the reader; further ones are dropped."""
_STANDARD_OUTPUT: Final = 1
_CLOSING_S: Final = 2.0


class LineWriter:
    """Writes lines to a file descriptor, in their order.

    It uses no file object: a thread that waits in one would hold its lock, and the interpreter could not end.

    Args:
        supervisor: of the thread. After an error (a reader that has gone) the thread tries again.
        descriptor: where lines go.
        most: lines that may wait.
    """

    def __init__(
        self, supervisor: Supervisor, descriptor: int = _STANDARD_OUTPUT, most: int = LINES_MOST
    ) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(most)
        self._stopping = threading.Event()
        self._refused = self._failed = self._told = 0
        self._thread = supervisor.start_thread("audit log", self._run, self._stopping)

    @property
    def dropped(self) -> int:
        """Lines that were not written: the queue was full, or the write failed."""
        return self._refused + self._failed

    def measure(self, meter: metrics.Meter) -> None:
        """Creates the instrument."""
        meter.create_observable_counter(
            "moe_frontend.audit_log.dropped",
            [lambda _: [metrics.Observation(self.dropped)]],
            "{line}",
            "Lines of the audit log that standard output did not take",
        )

    def put(self, line: str) -> None:
        """Queues a line, without its end; never waits. Called by one thread."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._refused += 1

    def close(self, patience_s: float = _CLOSING_S) -> None:
        """Writes what is queued, as far as the reader takes it in time. Blocks for `patience_s` at most."""
        ends = time.monotonic() + patience_s
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=patience_s)
        self._thread.join(max(0.0, ends - time.monotonic()))
        self._stopping.set()
        left = self._lines.qsize()
        if self._thread.is_alive() or left:
            _LOG.warning("audit log: the last lines are lost: nobody reads them (%d wait)", left)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(f"{line}\n".encode())
            except OSError:
                self._failed += 1
                raise
            if self.dropped > self._told:
                self._told = self.dropped
                _LOG.warning("audit log: %d lines were dropped so far: nobody read them", self._told)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]
