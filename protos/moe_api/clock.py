"""Timestamps that a step of the wall clock cannot pull apart.

Durations are differences of monotonic times. Where one has to become a timestamp (the start and end of a
span), an `Anchor` that was taken once gives all timestamps of a request the same offset.
"""

import time
from dataclasses import dataclass
from typing import Any

import grpc


@dataclass(frozen=True)
class Anchor:
    """One moment on both clocks, in nanoseconds: since the epoch, and of `time.monotonic_ns`."""

    wall_ns: int
    monotonic_ns: int

    @classmethod
    def now(cls) -> "Anchor":
        """This moment."""
        return cls(time.time_ns(), time.monotonic_ns())

    def timestamp_ns(self, monotonic_ns: int) -> int:
        """The timestamp, in nanoseconds since the epoch, of a monotonic time of this machine."""
        return self.wall_ns + monotonic_ns - self.monotonic_ns


def deadline_s(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """When the client of a call stops waiting, in seconds of `time.monotonic`; None where it never does.

    To be asked when the call begins: gRPC computes the time that remains from the wall clock.
    """
    remaining_s: float | None = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s
