"""The operations of DeepSeek's layers in W4A8 on the CPU kernels, and the fused call of all layers.

Projections, experts and head are int4 with int8 activations, W_UK and W_UV int8, as in the plain model.
Router, norms and embedding stay as they are; the residual is float32.

Legend: T tokens of a forward pass, I inputs, O outputs, D hidden, H heads, R latent rank, N query elements
without and P with rotary position, Q = N + P, W = R + P cache row, K experts of a token, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_worker.config.attention import LatentConfig
from moe_worker.config.model import ModelConfig
from moe_worker.errors import SettingsError
from moe_worker.kernels.cpu import operations
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.kernels.cpu.operations import PagedRows
from moe_worker.kernels.cpu.weights import INT4, HeadWeight, PackedWeight, pack, pack_heads
from moe_worker.kernels.linear import Linear
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.deepseek import DeepseekModel, DenseBlock, MoeBlock, TorchLayer
from moe_worker.models.layers import Layer, LayerStep, RoutedBlock, StageModel
from moe_worker.models.mla import INNER_NORM_EPS, AbsorbedAttention, LatentAttention
from moe_worker.models.native_fusion import Fusion
from moe_worker.models.stage import Stage
from moe_worker.moe.counting import Counter
from moe_worker.moe.dispatch import Dispatch
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import Router


@dataclass(frozen=True)
class NativeLinear:
    """A projection, of the RMSNorm of its inputs where `norm_I` is given; `weight` paired: with SwiGLU."""

    kernels: Kernels
    weight: PackedWeight
    norm_I: Tensor | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        x, _ = operations.quantize(self.kernels, x_TI.contiguous(), self.weight, self.norm_I, INNER_NORM_EPS)
        return operations.linear(self.kernels, x, self.weight)


@dataclass(frozen=True)
class NativeAttention(AbsorbedAttention):
    """Attention whose W_UK and W_UV are packed by heads."""

    kernels: Kernels
    input: NativeLinear
    query: NativeLinear | None
    latent_norm_R: Tensor
    key: HeadWeight
    value: HeadWeight
    output: NativeLinear
    rope_width: int
    scale: float
    rotations_CP: Tensor

    def write(self, latent_TW: Tensor, step: LayerStep) -> None:
        """See AbsorbedAttention."""
        places = step.batch.positions_T, step.batch.rows_T
        operations.write_latents(
            self.kernels, latent_TW.contiguous(), self.latent_norm_R, self.rotations_CP, places, _paged(step)
        )

    def absorb(self, query_TO: Tensor, step: LayerStep) -> Tensor:
        """See AbsorbedAttention."""
        query_THQ = query_TO.reshape(query_TO.shape[0], -1, self.key.inputs + self.rope_width)
        turned = operations.Rotation(self.rotations_CP, step.batch.positions_T, self.rope_width)
        return operations.heads(self.kernels, query_THQ, self.key, turned)

    def attend(self, query_THW: Tensor, step: LayerStep) -> Tensor:
        """See AbsorbedAttention."""
        return operations.attend(
            self.kernels, query_THW, _paged(step), self.latent_norm_R.shape[0], self.scale
        )

    def expand(self, latent_THR: Tensor) -> Tensor:
        """See AbsorbedAttention."""
        return operations.heads(self.kernels, latent_THR, self.value)


@dataclass(frozen=True)
class NativeDenseBlock:
    """SwiGLU feed-forward block."""

    gate_up: NativeLinear
    down: NativeLinear

    def forward(self, x_TD: Tensor, _step: LayerStep) -> Tensor:
        """[T, D] to [T, D]."""
        return self.down.forward(self.gate_up.forward(x_TD))


@dataclass(frozen=True, kw_only=True)
class NativeRouter(Router):
    """A router; its weights and bias are float32."""

    kernels: Kernels

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See Router; experts are int32."""
        experts_TK, weights_TK = operations.route(
            self.kernels, x_TD, self.weight_ED, self.bias_E, self.routing
        )
        self.choice.experts_TK = experts_TK[:, : self.routing.top_k].long()
        return experts_TK, weights_TK


@dataclass(frozen=True)
class NativeExperts:
    """SwiGLU experts, stacked."""

    kernels: Kernels
    gate_up: PackedWeight
    down: PackedWeight

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum over each token's experts, float32 [T, D]."""
        x, _ = operations.quantize(self.kernels, x_TD.contiguous(), self.gate_up)
        choice = experts_TK.int().contiguous(), weights_TK.contiguous()
        return operations.experts(self.kernels, x, self.gate_up, self.down, choice)


@dataclass(frozen=True)
class NativeMoeBlock(RoutedBlock):
    """Router and experts, and the way of tokens between them."""

    router: NativeRouter
    experts: NativeExperts
    dispatch: Dispatch


# The head of a stage that is not the last.
NO_HEAD = PackedWeight(torch.empty(0, dtype=torch.uint8), None, None, 0, 0, 0, 128, 128, INT4, paired=False)

NativeLayer = Layer[Tensor, NativeAttention, NativeDenseBlock | NativeMoeBlock]


@dataclass(frozen=True)
class NativeModel(StageModel):
    """A stage on the CPU kernels. `forward` may be called from one thread at a time.

    fused: whether one call computes all layers; without, a call computes one operation. Tokens are the same.
    """

    config: ModelConfig
    stage: Stage
    embedding_VD: Tensor
    layers: list[NativeLayer]
    norm_D: Tensor
    head: NativeLinear
    rotations_CP: Tensor
    kernels: Kernels
    fused: bool

    @classmethod
    def of(cls, model: DeepseekModel, kernels: Kernels, consume: bool = False) -> "NativeModel":
        """Packs the weights of `model`; fused where no tokens go to experts of other processes.

        consume: takes the layers out of `model`, one by one.

        Raises SettingsError for a model without latent attention, or whose projections are not int4.
        """
        if not isinstance(model.config.attention, LatentConfig):
            raise SettingsError(f"there are no CPU kernels for the attention of {model.config.architecture}")
        embedding_VD = model.embedding_VD.contiguous()
        if embedding_VD.dtype not in (torch.float32, torch.bfloat16):
            embedding_VD = embedding_VD.float()
        return cls(
            config=model.config,
            stage=model.stage,
            embedding_VD=embedding_VD,
            layers=[_layer(model, layer, kernels) for layer in model.each_layer(consume)],
            norm_D=_floats(model.norm_D),
            head=_linear(model.head, kernels) if model.stage.last else NativeLinear(kernels, NO_HEAD),
            rotations_CP=model.rotations_CP.contiguous(),
            kernels=kernels,
            fused=not model.stage.dispatches,
        )

    def converted(self, experts: Experts, rest: Callable[[], object]) -> NativeExperts:
        """See StageModel. Raises SettingsError."""
        return _experts(experts, self.kernels, rest)

    def norm(self, x_TD: Tensor, norm_D: Tensor) -> Tensor:
        """See StageModel."""
        return operations.norm(self.kernels, x_TD, norm_D, self.config.rms_norm_eps)

    def forward(self, batch: Batch, cache: PagedCache, x_TD: Tensor | None = None) -> Tensor:
        """See StageModel."""
        if self.fused:
            return self.fusion.run(batch, cache, x_TD)[0]
        return super().forward(batch, cache, x_TD)

    def next_logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """See StageModel."""
        if self.fused:
            return self.fusion.run(batch, cache, None, rows)[1]
        return super().next_logits(batch, cache, rows)

    def expert_counter(self) -> Counter:
        """See StageModel."""
        return self.fusion.expert_counter() if self.fused else super().expert_counter()

    def keep_choices(self) -> None:
        """See StageModel."""
        if self.fused:
            self.fusion.keep_choices()

    def choices(self) -> list[Tensor]:
        """See StageModel."""
        return self.fusion.choices() if self.fused else super().choices()

    @cached_property
    def fusion(self) -> Fusion:
        """All layers in one call."""
        return Fusion(self)


def _layer(model: DeepseekModel, layer: TorchLayer, kernels: Kernels) -> NativeLayer:
    block = layer.block
    return Layer(
        attention_norm=_floats(layer.attention_norm),
        attention=_attention(layer.attention, kernels, model.rotations_CP.contiguous()),
        block_norm=_floats(layer.block_norm),
        block=_moe(block, kernels) if isinstance(block, MoeBlock) else _dense(block, kernels),
    )


def _attention(attention: object, kernels: Kernels, rotations_CP: Tensor) -> NativeAttention:
    if not isinstance(attention, LatentAttention):
        raise SettingsError(f"there are no CPU kernels for {type(attention).__name__}")
    query = attention.query
    return NativeAttention(
        kernels=kernels,
        input=_linear(attention.input, kernels),
        query=None if query is None else _linear(query.linear, kernels, norm_I=_floats(query.norm_Q)),
        latent_norm_R=_floats(attention.latent_norm_R),
        key=pack_heads(attention.key_HNR.transpose(1, 2)),
        value=pack_heads(attention.value_HRV.transpose(1, 2)),
        output=_linear(attention.output, kernels),
        rope_width=attention.rope_width,
        scale=attention.scale,
        rotations_CP=rotations_CP,
    )


def _dense(block: DenseBlock, kernels: Kernels) -> NativeDenseBlock:
    return NativeDenseBlock(_linear(block.gate_up, kernels, paired=True), _linear(block.down, kernels))


def _moe(block: MoeBlock, kernels: Kernels) -> NativeMoeBlock:
    router, experts = block.router, block.experts
    bias_E = None if router.bias_E is None else _floats(router.bias_E)
    return NativeMoeBlock(
        NativeRouter(_floats(router.weight_ED), bias_E, router.routing, kernels=kernels),
        _experts(experts, kernels),
        block.dispatch,
    )


def _experts(experts: Experts, kernels: Kernels, rest: Callable[[], object] = lambda: None) -> NativeExperts:
    gate_up = pack(experts.gate_up_AFD, paired=True, rest=rest)
    return NativeExperts(kernels, gate_up, pack(experts.down_ADI, rest=rest))


def _linear(
    linear: Linear, kernels: Kernels, paired: bool = False, norm_I: Tensor | None = None
) -> NativeLinear:
    return NativeLinear(kernels, pack(linear.matrix, linear.bias_O, paired, linear.piece), norm_I)


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _paged(step: LayerStep) -> PagedRows:
    batch, cache = step.batch, step.cache
    rows_CW = cache.layers[step.layer]
    return PagedRows(rows_CW, cache.page_size, batch.pages_BP, batch.starts, batch.lengths_B)
