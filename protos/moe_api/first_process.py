"""What every entry point does before it imports anything else."""

from __future__ import annotations

import os
import signal
from types import FrameType


def prepare() -> None:
    """Sets what only works before the first import; entry points call it before they import anything else."""
    end_at_sigterm()
    # gRPC's core logs, below this level, bytes of its peers as they come: escape sequences, forged lines.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def end_at_sigterm() -> None:
    """Lets SIGTERM end the process, with exit code 143, until another handler is set.

    The kernel ignores a signal for which the first process of a PID namespace has no handler. Importing takes
    up to seconds: a pod that is deleted meanwhile would stay for its whole grace period.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    # Not sys.exit: nothing has begun that wants a tidy end, and an import may catch exceptions.
    os._exit(128 + number)
