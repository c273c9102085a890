"""How many kernels this process has compiled, and how long that took."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton import knobs


@dataclass
class Compiled:
    """Kernels that were compiled, the seconds for it, and kernels that the cache had."""

    kernels: int = 0
    seconds: float = 0.0
    cached: int = 0

    def note(self, times: Any, cache_hit: bool, **_: object) -> None:
        """A listener of Triton's: `times` are in microseconds."""
        if cache_hit:
            self.cached += 1
        else:
            self.kernels += 1
            self.seconds += times.total / 1e6

    def __str__(self) -> str:
        return (
            f"compiled {self.kernels} kernels in {self.seconds:.1f} s and found {self.cached} in "
            f"{knobs.cache.dir}"
        )


@contextmanager
def counted() -> Iterator[Compiled]:
    """Counts what is compiled meanwhile. One block at a time does."""
    before, found = knobs.compilation.listener, Compiled()
    knobs.compilation.listener = found.note
    try:
        yield found
    finally:
        knobs.compilation.listener = before
