"""Ends connections between GPUs, also while a kernel waits in an exchange for a rank that is gone.

NCCL's abort makes such kernels return, but comes back only when no CUDA graph refers to the connection any
more (NCCL 2.26 and later). So threads of their own abort, while the thread of the passes drops its graphs.
What does not come to an end within a limit ends the process: a rank that starts again is better than one
that hangs.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

log = logging.getLogger(__name__)
# Kernels return within milliseconds; freeing graphs and connections of a large model takes a second or two.
ABORT_S = 20.0


class Abortable(Protocol):
    """A process group over NCCL."""

    def abort(self) -> None:
        """Blocks until its connections are freed."""
        ...


def end_process(reason: str) -> None:
    """Ends this process at once, whatever its threads wait for."""
    log.critical("%s; this rank ends, so that it can start again", reason)
    os._exit(1)


class Abort:
    """Aborts `groups` together: one that waits for the whole device would wait for the kernels of another."""

    def __init__(self, groups: Sequence[Abortable], limit_s: float = ABORT_S) -> None:
        self.groups = groups
        self._ends = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._threads = [
            threading.Thread(target=_abort, args=(group,), name="mesh abort", daemon=True) for group in groups
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> bool:
        """Whether all have ended; waits until the limit for that."""
        for thread in self._threads:
            thread.join(max(0.0, self._ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def guard(self, end: Callable[[str], None] = end_process) -> None:
        """From now on another thread calls `end` if they have not ended at the limit."""

        def watch() -> None:
            if not self.wait():
                end(f"exchanges between GPUs were not aborted within {self._limit_s:g} s")

        threading.Thread(target=watch, name="mesh abort guard", daemon=True).start()


def _abort(group: Abortable) -> None:
    try:
        group.abort()
    except RuntimeError as error:  # of a connection that was being made, or is gone already
        log.warning("a connection between GPUs did not end in order: %s", error)
