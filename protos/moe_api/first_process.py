"""What the first process of a container has to do for itself."""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_at_sigterm() -> None:
    """Lets SIGTERM end the process, with exit code 143, until another handler is set.

    The kernel ignores a signal for which the first process of a PID namespace has no handler. Importing takes
    up to seconds: a pod that is deleted meanwhile would stay for its whole grace period. So entry points call
    this before they import anything else.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    # Not sys.exit: nothing has begun that wants a tidy end, and an import may catch exceptions.
    os._exit(128 + number)
