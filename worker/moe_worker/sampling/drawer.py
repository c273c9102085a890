"""Draws tokens for another process, which tells how: see sampling/remote.py.

Legend: D tokens drawn, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moe_worker.sampling.adjust import TokenCounts
from moe_worker.sampling.batch import SamplingBatch, build
from moe_worker.sampling.remote import FAILED, Draw
from moe_worker.sampling.sampler import KEPT_BATCHES, sample


class Drawer:
    """Draws tokens of many sequences. It remembers batches by what follows them, which changes no token."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts, self._device = TokenCounts(vocab_size, device), device
        self._next: dict[tuple[Draw, ...], SamplingBatch] = {}

    @torch.inference_mode()
    def tokens(self, logits_DV: Tensor, draws: tuple[Draw, ...]) -> Tensor:
        """int64 [D], FAILED where logits are not finite."""
        batch = self._next.pop(draws, None)
        if batch is None:
            batch = build(range(len(draws)), [draw.row for draw in draws], self._counts, self._device)
        sampled = sample(logits_DV, batch)
        batch.advance(sampled.tokens_B)
        self._next[tuple(replace(draw, index=draw.index + 1) for draw in draws)] = batch
        while len(self._next) > KEPT_BATCHES:
            self._next.pop(next(iter(self._next)))
        return sampled.tokens_B.masked_fill(sampled.failed_B, FAILED)
