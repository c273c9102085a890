"""Process settings that every entry point makes before it imports anything else."""

from __future__ import annotations

import os
import signal
from types import FrameType


def prepare() -> None:
    """Makes the settings that only work before the first import; entry points call it first."""
    end_at_sigterm()
    # Below this level gRPC's core logs bytes from the network unchanged: escape sequences, forged lines.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def end_at_sigterm() -> None:
    """Lets SIGTERM end the process, with exit code 143, until another handler is set.

    The kernel ignores a signal if the first process of a PID namespace has no handler for it. Imports take
    seconds; a pod that is deleted meanwhile would stay for its whole grace period.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    # Not sys.exit: nothing needs cleanup yet, and an import may catch exceptions.
    os._exit(128 + number)
