"""Structured sparsity that a model is trained into: patterns, when masks tighten, which weights stay."""

from moe_worker.compress.sparsity.patterns import PATTERNS, S14, S24, Pattern, mask_keeping
from moe_worker.compress.sparsity.schedule import Schedule
from moe_worker.compress.sparsity.sparsifier import Sparsifier

__all__ = ["PATTERNS", "S14", "S24", "Pattern", "Schedule", "Sparsifier", "mask_keeping"]
