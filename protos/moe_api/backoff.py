"""How long to pause before the next try. Pure."""

from dataclasses import dataclass
from typing import Final

_LARGEST_EXPONENT: Final = 32
"""Beyond it the pause is at its limit anyway, and a float would overflow in the end."""


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff with jitter: pauses double from `first_s` to `longest_s`, in seconds."""

    first_s: float = 0.5
    longest_s: float = 30.0

    def pause_s(self, failures: int, chance: float = 0.0) -> float:
        """Seconds to pause after `failures` failures in a row, at least 1.

        chance: from [0, 1); takes away up to half of the pause, so that loops that failed together do not
        retry together.
        """
        doubled = self.first_s * 2.0 ** min(max(failures, 1) - 1, _LARGEST_EXPONENT)
        return min(doubled, self.longest_s) * (1 - chance / 2)
