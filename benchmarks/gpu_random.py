"""Random models for GPU benchmarks and tests, and the same model in plain torch to compare with.

Legend: T tokens, D hidden, H heads, N query elements without and P with rotary position, R latent rank, V
value elements, A experts, I intermediate, F = 2 * I, W cache row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.triton.router import Choice
from moe_worker.kernels.triton.tiles import GROUP, PIECE, pack_int4, round_to_int4
from moe_worker.models.cuda import CudaModel
from moe_worker.models.cuda_layer import CudaLayer, LayerTensors, prepare_layer, split_dense

LARGE_CHOICE = Choice(6, 2, 1, 1, sigmoid=True, normalise=True, scale=1.0)


@dataclass(frozen=True)
class Shape:
    """Sizes of a random model; by default those of DeepSeek-V2-Lite, with DeepSeek-V3's router."""

    layers: int = 27
    hidden: int = 2048
    vocabulary: int = 102400
    heads: int = 16
    plain: int = 128
    rope: int = 64
    value: int = 128
    rank: int = 512
    dense: int = 10944
    inner: int = 1408
    choice: Choice = LARGE_CHOICE
    routed: int = 64
    context: int = 1024
    eps: float = 1e-6


SMALL = Shape(
    layers=3, hidden=256, vocabulary=512, heads=4, plain=32, rope=16, value=64, rank=64, dense=320, inner=128,
    choice=Choice(3, 2, 4, 2, sigmoid=True, normalise=True, scale=1.5), routed=16, context=256,
)  # fmt: skip


def random_layer(shape: Shape, dense: bool, device: torch.device) -> LayerTensors:
    def matrix(*sizes: int) -> Tensor:
        values = torch.randn(*sizes, device=device, dtype=torch.bfloat16)
        return values.mul_(sizes[-1] ** -0.5)

    s = shape
    ones = torch.ones(s.hidden, device=device, dtype=torch.bfloat16)
    experts = s.routed + s.choice.shared
    if dense:
        gate_up, down = split_dense(matrix(2 * s.dense, s.hidden), matrix(s.hidden, s.dense), s.inner)
    else:
        gate_up, down = matrix(experts, 2 * s.inner, s.hidden), matrix(experts, s.hidden, s.inner)
    return LayerTensors(
        attention_norm_D=ones,
        input_OD=matrix(s.heads * (s.plain + s.rope) + s.rank + s.rope, s.hidden),
        query_norm_Q=None,
        query_OQ=None,
        latent_norm_R=torch.ones(s.rank, device=device, dtype=torch.bfloat16),
        key_HNR=matrix(s.heads, s.plain, s.rank) * (s.rank / s.plain) ** 0.5,
        value_HRV=matrix(s.heads, s.rank, s.value) * (s.value / s.rank) ** 0.5,
        output_DO=matrix(s.hidden, s.heads * s.value),
        block_norm_D=ones,
        router_ED=None if dense else matrix(s.routed, s.hidden).float(),
        bias_E=None if dense else torch.randn(s.routed, device=device) * 0.02,
        gate_up_AFD=gate_up,
        down_ADI=down,
    )


def random_model(
    shape: Shape, pages: int, page: int, quantized: bool, device: torch.device
) -> tuple[CudaModel, list[LayerTensors], Tensor]:
    """The model, and with a SMALL shape the tensors that it was made of (a large one's are dropped)."""
    layers: list[CudaLayer] = []
    kept: list[LayerTensors] = []
    counts_LA = torch.zeros(
        shape.layers, shape.routed + shape.choice.shared, dtype=torch.int32, device=device
    )
    for index in range(shape.layers):
        tensors = random_layer(shape, index == 0, device)
        counts_A = counts_LA[index][: tensors.down_ADI.shape[0]]
        layers.append(prepare_layer(tensors, shape.choice, quantized, counts_A))
        if shape.vocabulary < 10000:
            kept.append(tensors)
    size = shape.vocabulary, shape.hidden
    embedding_VD = torch.randn(size, device=device, dtype=torch.bfloat16)
    head_VD = torch.randn(size, device=device, dtype=torch.bfloat16) * shape.hidden**-0.5
    width = shape.rank + shape.rope
    caches = [torch.zeros(pages * page, width, device=device, dtype=torch.bfloat16) for _ in layers]
    model = CudaModel(
        embedding_VD=embedding_VD, layers=tuple(layers),
        norm_D=torch.ones(shape.hidden, device=device, dtype=torch.bfloat16),
        head=pack_int4(head_VD) if quantized else head_VD,
        rotations_CP2=rotations(shape, device), eps=shape.eps, scale=1 / math.sqrt(shape.plain + shape.rope),
        page=page, caches=tuple(caches), counts_LA=counts_LA,
    )  # fmt: skip
    return model, kept, head_VD


def rotations(shape: Shape, device: torch.device) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, shape.rope, 2, dtype=torch.float32) / shape.rope)
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(device)


class PlainModel:
    """The same weights in float64 torch, whole sequences at once and no cache.

    W4A8 rounds weights and activations as the kernels do; all else is exact.
    """

    def __init__(
        self, shape: Shape, embedding: Tensor, layers: list[LayerTensors], head: Tensor, quantized: bool
    ) -> None:
        self.shape, self.layers, self.quantized = shape, layers, quantized
        self.embedding, self.head = embedding, head

    def logits(self, tokens_T: Tensor) -> Tensor:
        x = self.embedding[tokens_T].double()
        for tensors in self.layers:
            x = x + self.attention(tensors, self.norm(x))
            x = x + self.block(tensors, self.norm(x))
        return self.product(self.norm(x), self.head)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.shape.eps)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.quantized:
            return x @ weight.double().t()
        return rounded_tokens(x) @ rounded_weight(weight).t()

    def attention(self, w: LayerTensors, x: Tensor) -> Tensor:
        s = self.shape
        joint = self.product(x, w.input_OD)
        query, latent, rope = joint.split([s.heads * (s.plain + s.rope), s.rank, s.rope], dim=-1)
        query = query.unflatten(-1, (s.heads, -1))
        keys = torch.einsum("sr,hnr->shn", self.norm(latent), w.key_HNR.double())
        values = torch.einsum("sr,hrv->shv", self.norm(latent), w.value_HRV.double())
        turned = self.turn(rope.unsqueeze(1)).squeeze(1)
        scores = torch.einsum("thn,shn->hts", query[..., : s.plain], keys)
        scores = scores + torch.einsum("thp,sp->hts", self.turn(query[..., s.plain :]), turned)
        scores = scores / math.sqrt(s.plain + s.rope)
        count = x.shape[0]
        future = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        shares = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.product(torch.einsum("hts,shv->thv", shares, values).flatten(1), w.output_DO)

    def turn(self, x: Tensor) -> Tensor:
        table = rotations(self.shape, x.device)[: x.shape[0]].double()
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.view_as_complex(table).unsqueeze(1)).flatten(-2)

    def block(self, w: LayerTensors, x: Tensor) -> Tensor:
        count, experts = x.shape[0], w.down_ADI.shape[0]
        shares = torch.ones(count, experts, dtype=torch.float64, device=x.device)
        if w.router_ED is not None and w.bias_E is not None:
            shares = plain_route(x @ w.router_ED.double().t(), w.bias_E, self.shape.choice)
        out = torch.zeros_like(x)
        for expert in range(experts):
            gate, up = self.product(x, w.gate_up_AFD[expert]).chunk(2, dim=-1)
            hidden = functional.silu(gate) * up
            out = out + self.product(hidden, w.down_ADI[expert]) * shares[:, expert : expert + 1]
        return out


def plain_route(logits_TE: Tensor, bias_E: Tensor, choice: Choice) -> Tensor:
    """Weights of all experts, the shared ones behind, 0 where an expert is not chosen: [T, A]."""
    scores = logits_TE.sigmoid() if choice.sigmoid else logits_TE.softmax(-1)
    moved = scores + bias_E
    if choice.kept_groups < choice.groups:
        each = moved.unflatten(-1, (choice.groups, -1))
        group = each.topk(2 if choice.pair else 1, dim=-1).values.sum(-1)
        kept = torch.zeros_like(group).scatter(-1, group.topk(choice.kept_groups).indices, 1.0)
        moved = each.masked_fill(kept.unsqueeze(-1) == 0, float("-inf")).flatten(-2)
    experts = moved.topk(choice.top_k).indices
    weights = scores.gather(-1, experts)
    if choice.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    shares = torch.zeros_like(scores).scatter(-1, experts, weights * choice.scale)
    return torch.cat((shares, shares.new_ones(shares.shape[0], choice.shared)), dim=1)


def rounded_weight(weight_OI: Tensor) -> Tensor:
    """What int4 weights stand for, float64 [O, I]."""
    values, scales = round_to_int4(weight_OI)
    whole = (values.double() * scales.double().unsqueeze(-1)).transpose(-2, -3).flatten(-2)
    return whole[..., : weight_OI.shape[-1]]


def rounded_tokens(x_TI: Tensor) -> Tensor:
    """What int8 activations in pieces of 64 stand for, float64 [T, I]."""
    cut = x_TI.unflatten(-1, (-1, PIECE))
    scale = cut.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    rounded: Tensor = ((cut / scale).round() * scale).flatten(-2)
    return rounded


__all__ = ["GROUP", "SMALL", "PlainModel", "Shape", "plain_route", "random_model", "rounded_weight"]
