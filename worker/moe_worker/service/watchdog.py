"""Notices an engine that hangs, and does not mistake a pause of the edge itself for one."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

# Steps take milliseconds to seconds. An engine that has made none for so long, with requests to compute, is
# hung (a collective that waits for a rank that is gone, a driver that does not answer) and never comes back.
STALL_TIMEOUT_S: Final = 120.0
_TICKS: Final = 10  # within the timeout


@dataclass
class Watchdog:
    """Adds up how long the engine has been silent, in whole ticks.

    A tick that comes late counts as two at most. The edge was stopped then (SIGSTOP, a paused container or
    machine) or busy, and what the engine has sent meanwhile waits to be read.

    timeout_s: silence that means a hang. clock: seconds, monotonic.
    """

    timeout_s: float = STALL_TIMEOUT_S
    clock: Callable[[], float] = time.monotonic
    _silent_s: float = 0.0
    _waits: bool = False  # since the last tick: busy, and nothing heard
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
        """The engine has made a step."""
        self._waits = False

    def tick(self, *, busy: bool) -> None:
        """To be called every `tick_s`. busy: whether the engine has something to compute."""
        now_s = self.clock()
        elapsed_s, self._ticked_s = now_s - self._ticked_s, now_s
        self._silent_s = self._silent_s + min(elapsed_s, 2 * self.tick_s) if busy and self._waits else 0.0
        self._waits = busy

    async def watch(self, busy: Callable[[], bool], kill: Callable[[], None]) -> None:
        """Ticks until the engine hangs; calls `kill` then."""
        while not self.hung:
            await asyncio.sleep(self.tick_s)
            self.tick(busy=busy())
        kill()
