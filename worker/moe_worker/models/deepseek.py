"""The DeepSeek-V3 model over prepared weights.

Legend: T tokens of all sequences in the pass one behind the other, D hidden, F = 2 * I gate and up, I
intermediate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.config.model import ModelConfig
from moe_worker.kernels.linear import Linear
from moe_worker.kernels.reference import rms_norm, swiglu
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.attention import Attention
from moe_worker.models.batch import Batch
from moe_worker.models.memory import give_back_freed
from moe_worker.moe.counting import ExpertCounter
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import Router


@dataclass(frozen=True)
class DenseBlock:
    """SwiGLU feed-forward block; gate and up are one matrix, D to F."""

    gate_up: Linear
    down: Linear

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.down.forward(swiglu(self.gate_up.forward(x_TD)))


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
    """Attention and feed-forward block, each after a norm and with a residual connection."""

    attention_norm_D: Tensor
    attention: Attention
    block_norm_D: Tensor
    block: DenseBlock | MoeBlock


@dataclass(frozen=True)
class DeepseekModel:
    """All weights on one device, in one dtype (the router's in float32)."""

    config: ModelConfig
    embedding_VD: Tensor
    layers: list[Layer]
    norm_D: Tensor
    head: Linear
    rotations_CP: Tensor  # complex64, one row a position

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding_VD.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored and multiplied in."""
        return self.embedding_VD.dtype

    def each_layer(self, consume: bool) -> Iterator[Layer]:
        """One layer after the other; where `consume`, the model lets go of each, so that what is made of it
        can take its memory. Afterwards it has none.
        """
        if not consume:
            yield from self.layers
        while consume and self.layers:
            yield self.layers.pop(0)
            give_back_freed()

    def expert_counter(self) -> ExpertCounter:
        """Counts the experts that the passes from now on use; it wants to be told after each."""
        blocks = [(index, layer.block) for index, layer in enumerate(self.layers)]
        routers = {index: block.router for index, block in blocks if isinstance(block, MoeBlock)}
        choices = [router.choice for router in routers.values()]
        experts = max((router.weight_ED.shape[0] for router in routers.values()), default=0)
        return ExpertCounter(list(routers), choices, experts)

    def forward(self, batch: Batch, cache: PagedCache) -> Tensor:
        """Runs a pass, writing the cache; hidden states [T, D]."""
        eps = self.config.rms_norm_eps
        rotations_T1P = self.rotations_CP.index_select(0, batch.positions_T).unsqueeze(1)
        x_TD = functional.embedding(batch.tokens_T, self.embedding_VD)
        for index, layer in enumerate(self.layers):
            normed_TD = rms_norm(x_TD, layer.attention_norm_D, eps)
            x_TD = x_TD + layer.attention.forward(normed_TD, rotations_T1P, batch, cache, index)
            x_TD = x_TD + layer.block.forward(rms_norm(x_TD, layer.block_norm_D, eps))
        return x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        """Scores of the next token, float32 [T, vocabulary], from last hidden states."""
        return self.head.forward(rms_norm(x_TD, self.norm_D, self.config.rms_norm_eps)).float()
