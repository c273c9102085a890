"""The schedule of masks: dense, then ever sparser while weights may return, then fixed."""

from dataclasses import dataclass
from enum import Enum

from moe_worker.compress.sparsity.patterns import QUAD


class SparsityPhase(Enum):
    """The phase of masks at a step."""

    DENSE = "dense"
    TIGHTENING = "tightening"
    FIXED = "fixed"


@dataclass(frozen=True)
class Schedule:
    """Of `steps` steps the first `dense_share` are dense and the next `shrink_share` tighten masks to `kept`.

    If both shares are 0, the mask is chosen once, before the first step: pruning after training.
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
        """The first step with fixed masks."""
        return round(self.steps * (self.dense_share + self.shrink_share))

    def phase(self, step: int) -> SparsityPhase:
        """The phase at `step`, counted from 0."""
        if step >= self.first_fixed:
            return SparsityPhase.FIXED
        return SparsityPhase.TIGHTENING if step >= self.first_sparse else SparsityPhase.DENSE

    def kept_at(self, step: int) -> float:
        """Weights that a quad keeps at `step`, on average: from 4 to `kept` along a cubic.

        Source: Zhu and Gupta, arXiv 1710.01878: most weights go early, while the rest can still compensate.
        """
        if self.phase(step) is SparsityPhase.FIXED:
            return float(self.kept)
        left = (self.first_fixed - step) / max(1, self.first_fixed - self.first_sparse)
        return self.kept + (QUAD - self.kept) * min(1.0, left) ** 3
