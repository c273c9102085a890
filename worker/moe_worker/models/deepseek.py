"""The model in plain torch, over weights of any format; other backends are prepared from it.

Legend: T tokens of all sequences of a forward pass, one sequence after the other, D hidden, F = 2 * I gate
and up, I intermediate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moe_worker.config.model import ModelConfig
from moe_worker.kernels.linear import Linear
from moe_worker.kernels.reference import swiglu
from moe_worker.models.layers import Layer, LayerStep, RoutedBlock, StageModel, Sublayer
from moe_worker.models.memory import give_back_freed
from moe_worker.models.stage import Stage
from moe_worker.moe.dispatch import LOCAL, Dispatch
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import Router


@dataclass(frozen=True)
class DenseBlock:
    """SwiGLU feed-forward block; gate and up are one matrix, D to F."""

    gate_up: Linear
    down: Linear

    def forward(self, x_TD: Tensor, _step: LayerStep) -> Tensor:
        """[T, D] to [T, D]."""
        return self.down.forward(swiglu(self.gate_up.forward(x_TD)))


@dataclass(frozen=True)
class MoeBlock(RoutedBlock):
    """Router and experts, and the way of tokens between them."""

    router: Router
    experts: Experts
    dispatch: Dispatch = LOCAL


TorchLayer = Layer[Tensor, Sublayer, DenseBlock | MoeBlock]


@dataclass(frozen=True)
class DeepseekModel(StageModel):
    """A stage in plain torch, in one dtype (the router's weights are float32)."""

    config: ModelConfig
    stage: Stage
    embedding_VD: Tensor
    layers: list[TorchLayer]
    norm_D: Tensor
    head: Linear
    rotations_CP: Tensor  # complex64, one row a position

    def each_layer(self, consume: bool) -> Iterator[TorchLayer]:
        """One layer after the other. With `consume`, the model drops each one, so that what is made of it can
        take its memory; the model has no layers afterwards.
        """
        if not consume:
            yield from self.layers
        while consume and self.layers:
            yield self.layers.pop(0)
            give_back_freed()
