"""The DeepSeek-V3 model over prepared weights.

Legend: T tokens of all sequences in the pass one behind the other, D hidden, B sequences, S cached positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.config.model import ModelConfig
from moe_worker.kernels.reference import rms_norm, swiglu
from moe_worker.kvcache.latent import LatentCache
from moe_worker.models.attention import Attention, Positions, Span
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import Router


@dataclass(frozen=True)
class DenseBlock:
    """SwiGLU feed-forward block; gate and up are one matrix [2 * intermediate, D]."""

    gate_up_FD: Tensor
    down_DI: Tensor

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return functional.linear(swiglu(functional.linear(x_TD, self.gate_up_FD)), self.down_DI)


@dataclass(frozen=True)
class MoeBlock:
    """Router and experts."""

    router: Router
    experts: Experts

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.experts.forward(x_TD, *self.router.route(x_TD))


@dataclass(frozen=True)
class Layer:
    """Attention and feed-forward block, each behind a norm and beside a residual."""

    attention_norm_D: Tensor
    attention: Attention
    block_norm_D: Tensor
    block: DenseBlock | MoeBlock


@dataclass(frozen=True)
class DeepseekModel:
    """All weights on one device, in one dtype (the router's in float32)."""

    config: ModelConfig
    embedding_VD: Tensor
    layers: tuple[Layer, ...]
    norm_D: Tensor
    head_VD: Tensor
    rotations_CP: Tensor  # complex64, one row a position

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding_VD.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored and multiplied in."""
        return self.embedding_VD.dtype

    def forward(self, tokens: Sequence[int], spans: Sequence[Span], cache: LatentCache) -> Tensor:
        """Runs `tokens` (those of spans[0], then spans[1], ...) writing the cache; hidden states [T, D]."""
        positions = self._positions(spans, cache)
        eps = self.config.rms_norm_eps
        x_TD = functional.embedding(torch.tensor(tokens, device=self.device), self.embedding_VD)
        for index, layer in enumerate(self.layers):
            normed_TD = rms_norm(x_TD, layer.attention_norm_D, eps)
            x_TD = x_TD + layer.attention.forward(normed_TD, positions, cache, index)
            x_TD = x_TD + layer.block.forward(rms_norm(x_TD, layer.block_norm_D, eps))
        return x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        """Scores of the next token, float32 [T, vocabulary], from last hidden states."""
        normed_TD = rms_norm(x_TD, self.norm_D, self.config.rms_norm_eps)
        return functional.linear(normed_TD, self.head_VD).float()

    def _positions(self, spans: Sequence[Span], cache: LatentCache) -> Positions:
        numbers = [position for span in spans for position in range(span.start, span.end)]
        starts = [span.slot * cache.context for span in spans for _ in range(span.count)]
        rows = [start + position for start, position in zip(starts, numbers, strict=True)]
        positions_T = torch.tensor(numbers, device=self.device)
        return Positions(
            spans=spans,
            rotations_TP=self.rotations_CP.index_select(0, positions_T).unsqueeze(1),
            rows_T=torch.tensor(rows, device=self.device),
            mask_BS=self._decode_mask(spans) if len(numbers) == len(spans) > 1 else None,
        )

    def _decode_mask(self, spans: Sequence[Span]) -> Tensor | None:
        """True where a sequence has a token, [B, 1, 1, S]; None where all are equally long."""
        ends = [span.end for span in spans]
        if min(ends) == max(ends):
            return None
        ends_B1 = torch.tensor(ends, device=self.device).unsqueeze(1)
        return (torch.arange(max(ends), device=self.device) < ends_B1)[:, None, None, :]
