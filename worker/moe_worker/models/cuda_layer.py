"""One layer of the GPU path: about a dozen launches over prepared weights.

Legend: T tokens, D hidden, O outputs of the joint projection, H heads, N query elements without and P with
rotary position, R latent rank, W = R + P, V value elements, Q query rank, E routed experts, A all experts, I
intermediate of an expert, F = 2 * I, K experts a token, M = T * K rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.triton.attention import TokenTiles, attend, merge_values
from moe_worker.kernels.triton.experts import block_size, experts_bf16, experts_w4a8, sort_by_expert
from moe_worker.kernels.triton.latent import LatentWeights, write_latents
from moe_worker.kernels.triton.linear import linear_w4a8
from moe_worker.kernels.triton.norm import Activation, residual_norm
from moe_worker.kernels.triton.router import Choice, route
from moe_worker.kernels.triton.tiles import PackedInt4, pack_int4

Weight = Tensor | PackedInt4
INNER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class LayerTensors:
    """One layer's weights in bf16 on the GPU (the router's in float32), as the plain model has them."""

    attention_norm_D: Tensor
    input_OD: Tensor
    query_norm_Q: Tensor | None
    query_OQ: Tensor | None
    latent_norm_R: Tensor
    key_HNR: Tensor
    value_HRV: Tensor
    output_DO: Tensor
    block_norm_D: Tensor
    router_ED: Tensor | None
    bias_E: Tensor | None
    gate_up_AFD: Tensor
    down_ADI: Tensor


@dataclass(frozen=True)
class Pass:
    """What all layers of a pass share. rotations_CP2 is float32, cosine and sine of each position's pairs."""

    positions_T: Tensor
    rows_T: Tensor
    pages_BP: Tensor
    tiles: TokenTiles
    slices: int
    page: int
    rotations_CP2: Tensor
    eps: float
    scale: float


@dataclass(frozen=True)
class CudaLayer:
    """Prepared weights of a layer, bf16 or packed int4. A dense block is experts that all tokens take."""

    attention_norm_D: Tensor
    input: Weight
    query_norm_Q: Tensor | None
    query: Weight | None
    latent: LatentWeights
    value_HRV: Tensor
    output: Weight
    block_norm_D: Tensor
    router_ED: Tensor | None
    bias_E: Tensor | None
    choice: Choice
    gate_up: Weight
    down: Weight
    counts_A: Tensor

    @property
    def quantized(self) -> bool:
        """Whether products are W4A8."""
        return isinstance(self.output, PackedInt4)

    def attention(self, x_TD: Tensor, added_MD: Tensor | None, shared: Pass, cache_SW: Tensor) -> Tensor:
        """Adds `added_MD` to the residual `x_TD` in place; the attention's output [T, D], not yet added."""
        tokens = x_TD.shape[0]
        normed = Activation.empty(tokens, x_TD.shape[1], x_TD.device)
        residual_norm(x_TD, added_MD, self.attention_norm_D, shared.eps, normed, self.quantized)
        joint_TO = linear(normed, self.input)
        heads, _, rank = self.latent.key_HNR.shape
        width = cache_SW.shape[1]
        query_TO, latent_TW = joint_TO[:, :-width], joint_TO[:, -width:]
        if self.query is not None and self.query_norm_Q is not None:
            low = Activation.empty(tokens, query_TO.shape[1], x_TD.device)
            residual_norm(query_TO, None, self.query_norm_Q, INNER_NORM_EPS, low, self.quantized)
            query_TO = linear(low, self.query)
        query_THW = torch.empty(tokens, heads, width, dtype=x_TD.dtype, device=x_TD.device)
        write_latents(
            query_TO, latent_TW, self.latent, shared.rotations_CP2, shared.positions_T, shared.rows_T,
            cache_SW, query_THW,
        )  # fmt: skip
        parts_THSR, lse_THS = attend(
            query_THW, cache_SW, shared.pages_BP, shared.positions_T, shared.tiles, rank, shared.page,
            shared.scale, shared.slices,
        )  # fmt: skip
        values = Activation.empty(tokens, heads * self.value_HRV.shape[2], x_TD.device)
        merge_values(parts_THSR, lse_THS, self.value_HRV, values, self.quantized)
        return linear(values, self.output)

    def block(self, x_TD: Tensor, added_TD: Tensor, shared: Pass) -> Tensor:
        """Adds the attention's output to the residual; the experts' weighted outputs [M, D], to be added."""
        normed = Activation.empty(x_TD.shape[0], x_TD.shape[1], x_TD.device)
        residual_norm(x_TD, added_TD, self.block_norm_D, shared.eps, normed, self.quantized)
        experts_TK, weights_TK = self._routes(normed.x_TD)
        blocks = sort_by_expert(experts_TK, self.counts_A, block_size(x_TD.shape[0], self.quantized))
        if isinstance(self.gate_up, PackedInt4) and isinstance(self.down, PackedInt4):
            return experts_w4a8(normed, self.gate_up, self.down, blocks, weights_TK)
        assert isinstance(self.gate_up, Tensor) and isinstance(self.down, Tensor)  # noqa: S101, PT018
        return experts_bf16(normed.x_TD, self.gate_up, self.down, blocks, weights_TK)

    def _routes(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        if self.router_ED is not None:
            return route(x_TD, self.router_ED, self.bias_E, self.choice, self.counts_A)
        tokens, experts = x_TD.shape[0], self.counts_A.shape[0]
        self.counts_A.fill_(tokens)
        experts_TK = torch.arange(experts, dtype=torch.int32, device=x_TD.device).repeat(tokens, 1)
        return experts_TK, torch.ones(tokens, experts, device=x_TD.device)


def linear(x: Activation, weight: Weight) -> Tensor:
    """[T, O] in bf16."""
    if isinstance(weight, PackedInt4):
        return linear_w4a8(x, weight)
    return functional.linear(x.x_TD, weight)


def prepare_layer(tensors: LayerTensors, choice: Choice, quantized: bool, counts_A: Tensor) -> CudaLayer:
    """Repacks a layer's weights; `quantized` rounds its projections and experts to int4."""

    def ready(weight: Tensor) -> Weight:
        return pack_int4(weight) if quantized else weight.contiguous()

    return CudaLayer(
        attention_norm_D=tensors.attention_norm_D,
        input=ready(tensors.input_OD),
        query_norm_Q=tensors.query_norm_Q,
        query=None if tensors.query_OQ is None else ready(tensors.query_OQ),
        latent=LatentWeights(tensors.latent_norm_R, tensors.key_HNR.contiguous(), INNER_NORM_EPS),
        value_HRV=tensors.value_HRV.contiguous(),
        output=ready(tensors.output_DO),
        block_norm_D=tensors.block_norm_D,
        router_ED=tensors.router_ED,
        bias_E=tensors.bias_E,
        choice=choice,
        gate_up=ready(tensors.gate_up_AFD),
        down=ready(tensors.down_ADI),
        counts_A=counts_A,
    )


def split_dense(gate_up_FD: Tensor, down_DI: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A dense SwiGLU block as experts of `width`, whose outputs add up to its own: [A, F, D], [A, D, I].

    The last expert is padded by zeros.
    """
    count = math.ceil(down_DI.shape[1] / width)
    missing = count * width - down_DI.shape[1]
    gate, up = (functional.pad(part, (0, 0, 0, missing)) for part in gate_up_FD.chunk(2))
    gate_up = torch.cat((gate.unflatten(0, (count, width)), up.unflatten(0, (count, width))), dim=1)
    down = functional.pad(down_DI, (0, missing)).unflatten(1, (count, width)).transpose(0, 1)
    return gate_up, down.contiguous()
