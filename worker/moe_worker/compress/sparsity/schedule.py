"""When masks tighten: dense, then ever sparser while weights may come back, then fixed."""

from dataclasses import dataclass
from enum import Enum

from moe_worker.compress.sparsity.patterns import QUAD


class SparsityPhase(Enum):
    """What masks do at a step."""

    DENSE = "dense"
    TIGHTENING = "tightening"
    FIXED = "fixed"


@dataclass(frozen=True)
class Schedule:
    """Of `steps` steps the first `dense_share` are dense and the next `shrink_share` tighten masks to `kept`.

    With both shares 0 the mask is chosen once, before the first step: pruning after training.
    """

    steps: int
    kept: int
    dense_share: float = 0.2
    shrink_share: float = 0.6

    @property
    def first_sparse(self) -> int:
        """The step at which masks begin to tighten."""
        return round(self.steps * self.dense_share)

    @property
    def first_fixed(self) -> int:
        """The step from which masks stay as they are."""
        return round(self.steps * (self.dense_share + self.shrink_share))

    def phase(self, step: int) -> SparsityPhase:
        """What masks do at `step`, counted from 0."""
        if step >= self.first_fixed:
            return SparsityPhase.FIXED
        return SparsityPhase.TIGHTENING if step >= self.first_sparse else SparsityPhase.DENSE

    def kept_at(self, step: int) -> float:
        """Weights that a quad keeps at `step`, on average: from 4 to `kept` along a cubic.

        Source: Zhu and Gupta, arXiv 1710.01878: much goes early, while the rest can still make up for it.
        """
        if self.phase(step) is SparsityPhase.FIXED:
            return float(self.kept)
        left = (self.first_fixed - step) / max(1, self.first_fixed - self.first_sparse)
        return self.kept + (QUAD - self.kept) * min(1.0, left) ** 3
