"""The model, described once: layers of attention -> route -> dispatch -> experts -> combine.

A backend supplies the operations: plain torch (models/deepseek.py), which all others are compared with, the
CPU kernels (models/native.py), the GPU kernels (models/cuda_layer.py) and autograd (train/model.py).

Legend: T tokens of all sequences of a forward pass, one sequence after the other, N tokens whose logits are
wanted, D hidden, V vocabulary, P rotary elements of a head.
"""

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.config.model import ModelConfig
from moe_worker.kernels.reference import rms_norm
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.stage import Stage
from moe_worker.moe.counting import Counter, ExpertCounter
from moe_worker.moe.dispatch import Dispatch
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import Router


class LayerStep(NamedTuple):
    """What a layer needs of a forward pass in addition to the hidden states.

    rotations_T1P: complex64 rotary rotations of the tokens. layer: number in the stage, and so in the cache.
    """

    batch: Batch
    cache: PagedCache
    rotations_T1P: Tensor
    layer: int


class Sublayer(Protocol):
    """Attention or feed-forward block of a layer, over normalised hidden states; it knows its backend's."""

    def forward(self, x: Any, step: Any) -> Any:
        """What is to be added to the hidden states."""
        ...


@dataclass
class Residual:
    """Hidden states between the parts of a layer.

    norm: RMSNorm (arXiv:1910.07467) of hidden states by weights, in the backend.
    """

    x: Tensor
    norm: Callable[[Tensor, Any], Tensor]
    dropout: Callable[[Tensor], Tensor] | None = None

    def add(self, out: Any) -> None:
        """Adds the output of a part."""
        self.x = self.x + (out if self.dropout is None else self.dropout(out))


N = TypeVar("N")
A = TypeVar("A", bound=Sublayer)
B = TypeVar("B", bound=Sublayer)


@dataclass(frozen=True)
class Layer(Generic[N, A, B]):
    """Attention and feed-forward block, each after a norm and with a residual connection."""

    attention_norm: N
    attention: A
    block_norm: N
    block: B

    def forward(self, residual: Residual, step: Any) -> None:
        """Adds the outputs of both parts to `residual`."""
        residual.add(self.attention.forward(residual.norm(residual.x, self.attention_norm), step))
        residual.add(self.block.forward(residual.norm(residual.x, self.block_norm), step))


class Projects(Protocol):
    """A matrix and perhaps a bias."""

    def forward(self, x_TI: Tensor, /) -> Tensor:
        """[T, I] to [T, O]."""
        ...


class ComputesExperts(Protocol):
    """The experts of one layer that this process holds."""

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, /) -> Tensor:
        """Weighted sum over each token's experts [T, D]; expert -1 is none."""
        ...


def through_experts(
    x_TD: Tensor, choice: tuple[Tensor, Tensor], compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    dispatch: Dispatch,
) -> Tensor:  # fmt: skip
    """Brings tokens to their experts and the weighted sums of the outputs back, [T, D].

    choice: experts of each token and their weights, [T, K]. compute: `ComputesExperts.forward`.
    """
    return dispatch.gather(compute(*dispatch.scatter(x_TD, *choice)))


class RoutedBlock:
    """Router, experts, and the way of tokens between them."""

    router: Router
    experts: ComputesExperts
    dispatch: Dispatch

    def forward(self, x_TD: Tensor, _step: LayerStep) -> Tensor:
        """[T, D] to [T, D]."""
        return through_experts(x_TD, self.router.route(x_TD), self.experts.forward, self.dispatch)


class StageModel:
    """A stage's weights on one device.

    embedding_VD is empty where the stage is not the first; norm_D and the head's weights are where it is not
    the last. Hidden states have the dtype of norm_D.
    """

    config: ModelConfig
    stage: Stage
    embedding_VD: Tensor
    layers: MutableSequence[Layer[Tensor, Any, Any]]
    norm_D: Tensor
    head: Projects
    rotations_CP: Tensor  # complex64, one row a position

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm_D.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of hidden states."""
        return self.norm_D.dtype

    def norm(self, x_TD: Tensor, norm_D: Tensor) -> Tensor:
        """RMSNorm, here in plain torch; [T, D]."""
        return rms_norm(x_TD, norm_D, self.config.rms_norm_eps)

    def forward(self, batch: Batch, cache: PagedCache, x_TD: Tensor | None = None) -> Tensor:
        """Computes the stage's layers and writes its cache; hidden states [T, D].

        x_TD: those of the stage before; the first stage embeds the tokens.
        """
        rotations_T1P = self.rotations_CP.index_select(0, batch.positions_T).unsqueeze(1)
        if x_TD is None:
            x_TD = functional.embedding(batch.tokens_T, self.embedding_VD).to(self.dtype)
        residual = Residual(x_TD, self.norm)
        for index, layer in enumerate(self.layers):
            layer.forward(residual, LayerStep(batch, cache, rotations_T1P, index))
        return residual.x

    def logits(self, x_ND: Tensor) -> Tensor:
        """Scores of the next token, float32 [N, V], from last hidden states."""
        return self.head.forward(self.norm(x_ND, self.norm_D)).float()

    def next_logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """Logits [N, V] of the tokens at `rows`, which rise, by a stage that is the whole model."""
        hidden_TD = self.forward(batch, cache)
        if len(rows) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD[torch.tensor(rows, dtype=torch.long, device=hidden_TD.device)]
        return self.logits(hidden_TD)

    def set_experts(self, layer: int, experts: Any) -> ComputesExperts:
        """Computes `experts` of the model's `layer` from the next pass on, and returns those of before."""
        index = layer - self.stage.begin
        own = self.layers[index]
        self.layers[index] = replace(own, block=replace(own.block, experts=experts))
        before: ComputesExperts = own.block.experts
        return before

    def converted(self, experts: Experts, rest: Callable[[], object]) -> ComputesExperts:
        """Experts in this backend. rest: called between matrices."""
        del rest
        return experts

    def expert_counter(self) -> Counter:
        """Counts the experts that forward passes use from now on; call `count` after each."""
        blocks = zip(self.stage.layers, (layer.block for layer in self.layers), strict=True)
        routers = {index: block.router for index, block in blocks if isinstance(block, RoutedBlock)}
        choices = [router.choice for router in routers.values()]
        return ExpertCounter(list(routers), choices, self.config.moe.routed)

    def keep_choices(self) -> None:
        """Lets `choices` tell the experts of forward passes from now on."""

    def choices(self) -> list[Tensor]:
        """The routed experts of each token in the newest pass, [T, K], layer by layer; -1: none."""
        blocks = (layer.block for layer in self.layers)
        chosen = (block.router.choice.experts_TK for block in blocks if isinstance(block, RoutedBlock))
        return [experts_TK for experts_TK in chosen if experts_TK is not None]
