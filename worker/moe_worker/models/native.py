"""A DeepSeek model in W4A8 on the CPU kernels: a forward pass is one call.

Projections, experts and head are int4 with int8 activations, W_UK and W_UV bfloat16, as in the plain model.
Router, norms and embedding stay as they are; the residual is float32.

Legend: T tokens of the pass, N tokens whose logits are wanted, B sequences, P pages of the longest one, V
vocabulary.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.config.attention import LatentConfig
from moe_worker.errors import SettingsError
from moe_worker.kernels.cpu import structs
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.kernels.cpu.weights import PackedWeight, pack, pack_heads
from moe_worker.kernels.linear import Linear
from moe_worker.models.deepseek import DeepseekModel, Layer, MoeBlock
from moe_worker.models.mla import INNER_NORM_EPS, LatentAttention


@dataclass(frozen=True)
class NativePass:
    """What one pass computes; int64: tokens_T, positions_T, rows_T; int32: all others.

    starts: first token of each sequence, [B + 1]. lengths_B: tokens in the cache once the pass is done.
    pages_BP: page table. selected_N: tokens whose logits are wanted. All are contiguous.
    """

    tokens_T: Tensor
    positions_T: Tensor
    rows_T: Tensor
    starts: Tensor
    lengths_B: Tensor
    pages_BP: Tensor
    selected_N: Tensor


class NativeModel:
    """Packs the weights of a model once; `run` may be called from one thread at a time."""

    def __init__(self, model: DeepseekModel, kernels: Kernels, consume: bool = False) -> None:
        """consume: takes the layers out of `model`, one by one.

        Raises SettingsError for a model without latent attention, or whose projections are not int4.
        """
        attention = model.config.attention
        if not isinstance(attention, LatentConfig):
            raise SettingsError(f"there are no CPU kernels for the attention of {model.config.architecture}")
        self.kernels = kernels
        self.vocabulary = model.config.vocab_size
        self._kept: list[object] = []  # whatever the structs point at
        routed = [index for index, layer in enumerate(model.layers) if isinstance(layer.block, MoeBlock)]
        counts = torch.zeros(len(routed), model.config.moe.routed + 1, dtype=torch.int64)
        self._used = dict(zip(routed, counts, strict=True))
        scale = _latent(model.layers[0]).scale
        layers = [self._layer(layer) for layer in model.each_layer(consume)]
        self._layers = (structs.LayerStruct * len(layers))(*layers)
        for index, used in self._used.items():
            self._layers[index].experts_used = used.data_ptr()
        self._arguments = self._fill(model, attention)
        self._arguments.attention_scale = scale

    def run(self, step: NativePass, layers: Sequence[Tensor], page_size: int) -> Tensor:
        """Runs a pass and writes `layers`, the cache [rows, W] of each layer, float32 or bfloat16.

        Returns float32 logits [N, V]. Raises MemoryError where scratch memory is short.
        """
        for struct, rows in zip(self._layers, layers, strict=True):
            struct.cache_rows = rows.data_ptr()
        arguments = self._arguments
        arguments.cache = _cache(step, layers[0], page_size)
        logits_NV = torch.empty(step.selected_N.shape[0], self.vocabulary)
        arguments.tokens, arguments.positions = step.tokens_T.data_ptr(), step.positions_T.data_ptr()
        arguments.rows, arguments.selected = step.rows_T.data_ptr(), step.selected_N.data_ptr()
        arguments.logits = logits_NV.data_ptr()
        arguments.count, arguments.selected_count = step.tokens_T.shape[0], step.selected_N.shape[0]
        self.kernels.run(arguments)
        return logits_NV

    @property
    def experts_used(self) -> dict[int, Tensor]:
        """By layer, over all passes: tokens of each routed expert, and behind them the experts of each pass
        that had at least one, added up; int64 [E + 1], a copy."""
        return {layer: used.clone() for layer, used in self._used.items()}

    def _fill(self, model: DeepseekModel, attention: LatentConfig) -> structs.ForwardArguments:
        config, embedding = model.config, model.embedding_VD.contiguous()
        if embedding.dtype not in (torch.float32, torch.bfloat16):
            embedding = embedding.float()
        rotations = torch.view_as_real(model.rotations_CP).contiguous()
        self._kept += [embedding, rotations]
        arguments = structs.ForwardArguments(
            layers=ctypes.addressof(self._layers),
            embedding=embedding.data_ptr(),
            norm=self._floats(model.norm_D),
            head=self._linear(model.head),
            rotations=rotations.data_ptr(),
            embedding_bf16=int(embedding.dtype == torch.bfloat16),
            layer_count=len(self._layers),
            vocabulary=config.vocab_size,
            hidden=config.hidden_size,
            heads=attention.num_attention_heads,
            plain=attention.qk_nope_head_dim,
            rope=attention.qk_rope_head_dim,
            rank=attention.kv_lora_rank,
            value=attention.v_head_dim,
            query_rank=attention.q_lora_rank or 0,
            segment=min(kept.segment for kept in self._kept if isinstance(kept, PackedWeight)),
            eps=config.rms_norm_eps,
            inner_eps=INNER_NORM_EPS,
        )
        routing = config.moe.routing
        arguments.experts, arguments.routed_scale = routing.experts, routing.scale
        structs.set_choice(arguments, routing)
        return arguments

    def _layer(self, layer: Layer) -> structs.LayerStruct:
        attention = _latent(layer)
        struct = structs.LayerStruct(
            attention_norm=self._floats(layer.attention_norm_D),
            latent_norm=self._floats(attention.latent_norm_R),
            block_norm=self._floats(layer.block_norm_D),
            input=self._linear(attention.input),
            key=self._heads(attention.key_HNR),
            value=self._heads(attention.value_HRV),
            output=self._linear(attention.output),
        )
        if attention.query is not None:
            struct.query_norm = self._floats(attention.query.norm_Q)
            struct.query = self._linear(attention.query.linear)
        if isinstance(layer.block, MoeBlock):
            router, experts = layer.block.router, layer.block.experts
            struct.router = self._floats(router.weight_ED)
            struct.router_bias = None if router.bias_E is None else self._floats(router.bias_E)
            struct.gate_up = self._keep(pack(experts.gate_up_AFD, paired=True))
            struct.down = self._keep(pack(experts.down_ADI))
        else:
            struct.gate_up = self._linear(layer.block.gate_up, paired=True)
            struct.down = self._linear(layer.block.down)
        return struct

    def _floats(self, tensor: Tensor) -> int:
        tensor = tensor.float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _keep(self, weight: PackedWeight) -> structs.Weight:
        self._kept.append(weight)
        return weight.struct

    def _heads(self, weight_HIO: Tensor) -> structs.HeadWeightStruct:
        packed = pack_heads(weight_HIO.transpose(1, 2))
        self._kept.append(packed)
        return packed.struct

    def _linear(self, linear: Linear, paired: bool = False) -> structs.Weight:
        return self._keep(pack(linear.matrix, linear.bias_O, paired, linear.piece))


class NativeCounter:
    """The experts that a model's passes use from now on; the kernels count them."""

    def __init__(self, model: NativeModel) -> None:
        self._model, self._before, self._passes = model, model.experts_used, 0

    def count(self, tokens: int) -> None:
        """Takes note of a pass; which has no padding, so that all its tokens count."""
        del tokens
        self._passes += 1

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """See models.runner.Counter."""
        rows = []
        for layer, used in self._model.experts_used.items():
            *tokens, active = (used - self._before[layer]).tolist()
            rows.append((layer, tokens, active))
        return self._passes, rows


def _latent(layer: Layer) -> LatentAttention:
    if not isinstance(layer.attention, LatentAttention):
        raise SettingsError(f"there are no CPU kernels for {type(layer.attention).__name__}")
    return layer.attention


def _cache(step: NativePass, rows: Tensor, page_size: int) -> structs.Cache:
    return structs.Cache(
        None,
        int(rows.dtype == torch.bfloat16),
        page_size.bit_length() - 1,
        step.pages_BP.data_ptr(),
        step.starts.data_ptr(),
        step.lengths_B.data_ptr(),
        step.pages_BP.shape[1],
        step.pages_BP.shape[0],
    )
