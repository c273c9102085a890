"""Timestamps that stay consistent when the wall clock is stepped.

Durations are differences of monotonic times. Where a monotonic time has to become a timestamp (the start and
end of a span), one `Anchor` gives all timestamps of a request the same offset.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

_YEAR_S: Final = 365 * 86_400.0
_SLEW: Final = 0.05
"""How much slower a `ForwardClock` runs while it is ahead."""


@dataclass(frozen=True)
class Anchor:
    """The same moment on both clocks, in nanoseconds: since the epoch, and of `time.monotonic_ns`."""

    wall_ns: int
    monotonic_ns: int

    @classmethod
    def now(cls) -> "Anchor":
        """This moment."""
        return cls(time.time_ns(), time.monotonic_ns())

    def timestamp_ns(self, monotonic_ns: int) -> int:
        """The timestamp, in nanoseconds since the epoch, of a monotonic time of this machine."""
        return self.wall_ns + monotonic_ns - self.monotonic_ns


class ForwardClock:
    """The wall clock, but it never goes back: when the wall clock is set back, it runs on, 5 % slower until
    the wall clock has caught up (20 h for an hour).

    For values that are ordered by their time, and compared with times of other machines. It follows a step
    forward. Seconds since the epoch.

    Args:
        wall: seconds since the epoch.
        monotonic: seconds.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._read = float("-inf"), 0.0
        """The last result, and when it was read on the monotonic clock."""

    def __call__(self) -> float:
        """Now."""
        # The wall clock is read first: after a pause between the two, this one is behind, never ahead.
        (last, at), wall, now = self._read, self._wall(), self._monotonic()
        self._read = max(wall, last + (1 - _SLEW) * (now - at)), now
        return self._read[0]


class Timed(Protocol):
    """A call that may have a deadline: a grpc.aio.ServicerContext, or what takes its place."""

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None where there is none."""


def deadline_s(context: Timed) -> float | None:
    """When the client of a call stops waiting, in seconds of `time.monotonic`; None where it never does.

    Call this when the call starts: gRPC computes the remaining time from the wall clock.
    """
    left_s = remaining_s(context)
    return None if left_s is None else time.monotonic() + left_s


def remaining_s(context: Timed) -> float | None:
    """Seconds until the deadline of a call, at most a year; None if it has none.

    Clients may send a deadline centuries ahead. As the timeout of another call it would overflow gRPC's
    nanoseconds, and that call would end at once.
    """
    left_s: float | None = context.time_remaining()
    return None if left_s is None else min(left_s, _YEAR_S)
