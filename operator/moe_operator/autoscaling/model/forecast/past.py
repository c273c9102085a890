"""The observed rates, with gaps filled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]


class Past:
    """Rates of consecutive steps, oldest first; gaps are filled with the median of the rates before them.

    Args:
        day: steps of a day.
        level: window of that median, in steps.
    """

    KEPT_DAYS = 14

    def __init__(self, day: int, level: int) -> None:
        self.day = day
        self._level = level
        self._most = self.KEPT_DAYS * day
        self._rates = np.zeros(2 * self._most)
        self._known = np.zeros(2 * self._most, bool)
        self._length = 0
        self.end = 0
        """Number of the step after the last one."""

    def append(self, step: int, rate: float | None) -> None:
        """Appends the rate of a later step; None if it is unknown. Skipped steps are unknown, too."""
        holes = min(step - self.end, self._most) if self._length else 0
        fill = float(np.median(self.rates[-self._level :])) if self._length else 0.0
        for _ in range(holes):
            self._push(fill, known=False)
        self._push(fill if rate is None else rate, known=rate is not None)
        self.end = step + 1

    def _push(self, rate: float, *, known: bool) -> None:
        if self._length == len(self._rates):
            for array in (self._rates, self._known):
                array[: self._most] = array[-self._most :]
            self._length = self._most
        self._rates[self._length] = rate
        self._known[self._length] = known
        self._length += 1

    def __len__(self) -> int:
        return min(self._length, self._most)

    @property
    def rates(self) -> Floats:
        """Rates [steps], at most 14 days; a view that the next `append` may change."""
        return self._rates[self._length - len(self) : self._length]

    @property
    def known(self) -> NDArray[np.bool_]:
        """Whether a rate was observed (True) or filled in [steps]."""
        return self._known[self._length - len(self) : self._length]

    def copy(self) -> Past:
        """A copy for another thread, which `append` does not change."""
        other = Past(self.day, self._level)
        other._length = len(self)
        other._rates[: len(self)] = self.rates
        other._known[: len(self)] = self.known
        other.end = self.end
        return other
