"""Training into structured sparsity: patterns, the schedule of masks, and the choice of weights."""

from moe_worker.compress.sparsity.patterns import PATTERNS, S14, S24, Pattern, mask_keeping
from moe_worker.compress.sparsity.schedule import Schedule
from moe_worker.compress.sparsity.sparsifier import Sparsifier

__all__ = ["PATTERNS", "S14", "S24", "Pattern", "Schedule", "Sparsifier", "mask_keeping"]
