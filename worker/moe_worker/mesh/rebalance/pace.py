"""How much a rank reads during its passes: `Grants` decides and is pure, `Pace` waits.

A thread that reads experts delays the passes of its rank, and so those of all ranks: by what it takes of the
processor, the memory, and the interpreter's lock. So it works in pieces, each at most a matrix, and measures
the processor time of each. A pass grants it a share of its own processor time, so that a busy machine slows
both equally; a pass that is late grants nothing. Threads have equal priority: one of lower priority would
keep the interpreter's lock from the passes for as long as other processes run. On a GPU, passes only launch
kernels: there the time from one pass to the next counts, of which the processor is busy for a small part.
"""

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

# The share of a pass's processor time that the thread may use, too.
SHARE = 0.25
# A pass is late if it takes so many times the median of the latest ones.
LATE, LATEST = 1.5, 32
# A rank that has not computed for so long has nothing to delay.
IDLE_S = 0.05


class Grants:
    """Work that passes have granted and that is not done yet. left_s: seconds; below 0 it was too much."""

    def __init__(self) -> None:
        self.left_s = 0.0
        self._latest: deque[tuple[float, float]] = deque(maxlen=LATEST)

    def passed(self, seconds: float, busy_s: float) -> None:
        """A pass took so long, and so much processor time. Grants do not add up: each is for one pass."""
        latest = self._latest or [(seconds, busy_s)]
        usual_s, usual_busy_s = (statistics.median(each) for each in zip(*latest, strict=True))
        self._latest.append((seconds, busy_s))
        if seconds <= LATE * usual_s:
            granted_s = SHARE * min(busy_s, usual_busy_s)
            self.left_s = min(self.left_s + granted_s, granted_s)

    def worked(self, seconds: float) -> None:
        """A piece of work took so long."""
        self.left_s -= seconds


class Pace:
    """Lets one thread work during the passes of another. clock: monotonic; busy: the processor time of the
    calling thread; both in seconds. launches: whether passes end before a device has computed them.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, busy: Callable[[], float] = time.thread_time,
        launches: bool = False,
    ) -> None:  # fmt: skip
        self._clock, self._busy, self._launches = clock, busy, launches
        self._grants = Grants()
        self._changed = threading.Condition()
        self._computes, self._ended = False, clock()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """During a pass."""
        began, before = self._clock(), self._busy()
        with self._changed:
            self._computes = True
        try:
            yield
        finally:
            with self._changed:
                last, self._computes, self._ended = self._ended, False, self._clock()
                took = self._ended - began, self._busy() - before
                if self._launches:
                    since_last = min(self._ended - last, IDLE_S)
                    took = since_last, since_last
                self._grants.passed(*took)
                self._changed.notify_all()

    def work(self, wanted: Callable[[], bool]) -> "PacedWork":
        """Work of the calling thread, while it is wanted."""
        return PacedWork(self._wait, self._busy, wanted)

    def _wait(self, worked_s: float, wanted: Callable[[], bool]) -> None:
        with self._changed:
            self._grants.worked(worked_s)
            while self._grants.left_s <= 0 and not self._idle() and wanted():
                self._changed.wait(IDLE_S)

    def _idle(self) -> bool:
        return not self._computes and self._clock() - self._ended >= IDLE_S


class DroppedError(Exception):
    """The work is not wanted any more."""


class PacedWork:
    """Of one thread, which calls `rest` after each piece."""

    def __init__(
        self, wait: Callable[[float, Callable[[], bool]], None], busy: Callable[[], float],
        wanted: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._wait, self._busy, self._wanted = wait, busy, wanted
        self._since = busy()

    def rest(self) -> None:
        """Returns when passes have granted what was done since the last call. Raises DroppedError."""
        self._wait(self._busy() - self._since, self._wanted)
        if not self._wanted():
            raise DroppedError
        self._since = self._busy()
