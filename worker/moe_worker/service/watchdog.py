"""Detects an engine that hangs, and does not mistake a pause of the edge itself for a hang."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

# Steps take milliseconds to seconds. An engine without a step for this long, with requests to compute, hangs
# (a collective that waits for a lost rank, a driver that does not respond) and never recovers.
STALL_TIMEOUT_S: Final = 120.0
_TICKS: Final = 10  # within the timeout


@dataclass
class Watchdog:
    """Measures how long the engine has been silent, in whole ticks.

    A late tick counts as at most two. The edge was stopped then (SIGSTOP, a paused container or machine) or
    busy, and the engine's messages have not been read yet.

    timeout_s: duration of silence that means a hang. clock: seconds, monotonic.
    """

    timeout_s: float = STALL_TIMEOUT_S
    clock: Callable[[], float] = time.monotonic
    _silent_s: float = 0.0
    _waits: bool = False  # since the last tick: busy, and no message
    _ticked_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._ticked_s = self.clock()

    @property
    def tick_s(self) -> float:
        """Seconds between two ticks."""
        return self.timeout_s / _TICKS

    @property
    def hung(self) -> bool:
        """Whether the engine has been silent for longer than the timeout."""
        return self._silent_s > self.timeout_s

    def heard(self) -> None:
        """Records a step of the engine, or that it waits for a rank of its mesh."""
        self._waits = False

    def tick(self, *, busy: bool) -> None:
        """Call this every `tick_s`. busy: whether the engine has something to compute."""
        now_s = self.clock()
        elapsed_s, self._ticked_s = now_s - self._ticked_s, now_s
        self._silent_s = self._silent_s + min(elapsed_s, 2 * self.tick_s) if busy and self._waits else 0.0
        self._waits = busy

    async def watch(self, busy: Callable[[], bool], kill: Callable[[], None]) -> None:
        """Ticks until the engine hangs, then calls `kill`."""
        while not self.hung:
            await asyncio.sleep(self.tick_s)
            self.tick(busy=busy())
        kill()
