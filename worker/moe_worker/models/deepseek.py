"""The model over prepared weights: layers of attention -> route -> dispatch -> experts -> combine.

This description is the truth; backends that fuse more (kernels/cpu, kernels/triton) are made of it.

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
from moe_worker.models.stage import Stage
from moe_worker.moe.counting import ExpertCounter
from moe_worker.moe.dispatch import LOCAL, Dispatch
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
    """Router and experts, and the way of tokens between them."""

    router: Router
    experts: Experts
    dispatch: Dispatch = LOCAL

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        received = self.dispatch.scatter(x_TD, *self.router.route(x_TD))
        return self.dispatch.gather(self.experts.forward(*received))


@dataclass(frozen=True)
class Layer:
    """Attention and feed-forward block, each after a norm and with a residual connection."""

    attention_norm_D: Tensor
    attention: Attention
    block_norm_D: Tensor
    block: DenseBlock | MoeBlock


@dataclass(frozen=True)
class DeepseekModel:
    """A stage's weights on one device, in one dtype (the router's in float32).

    embedding_VD is empty where the stage is not the first; norm_D and the head's weights are where it is not
    the last.
    """

    config: ModelConfig
    stage: Stage
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
        blocks = zip(self.stage.layers, (layer.block for layer in self.layers), strict=True)
        routers = {index: block.router for index, block in blocks if isinstance(block, MoeBlock)}
        choices = [router.choice for router in routers.values()]
        return ExpertCounter(list(routers), choices, self.config.moe.routed)

    def forward(self, batch: Batch, cache: PagedCache, x_TD: Tensor | None = None) -> Tensor:
        """Runs a pass through the stage, writing its cache; hidden states [T, D].

        x_TD: those of the stage before; the first stage makes them of the tokens.
        """
        eps = self.config.rms_norm_eps
        rotations_T1P = self.rotations_CP.index_select(0, batch.positions_T).unsqueeze(1)
        if x_TD is None:
            x_TD = functional.embedding(batch.tokens_T, self.embedding_VD)
        for index, layer in enumerate(self.layers):
            normed_TD = rms_norm(x_TD, layer.attention_norm_D, eps)
            if batch.segments:  # a rank of a mesh may have none, and still compute others' experts
                x_TD = x_TD + layer.attention.forward(normed_TD, rotations_T1P, batch, cache, index)
            x_TD = x_TD + layer.block.forward(rms_norm(x_TD, layer.block_norm_D, eps))
        return x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        """Scores of the next token, float32 [T, vocabulary], from last hidden states."""
        return self.head.forward(rms_norm(x_TD, self.norm_D, self.config.rms_norm_eps)).float()
