"""Builds the model from tensors named as in a Hugging Face checkpoint of DeepSeek-V3.

Legend: D hidden, H heads, N query elements without and P with rotary position, R latent rank, V value
elements of a head, Q query rank, I intermediate of one expert.
"""

from typing import Protocol

import torch
from torch import Tensor

from moe_worker.config.model import ModelConfig
from moe_worker.kernels.linear import DenseLinear
from moe_worker.models.deepseek import DeepseekModel, DenseBlock, Layer, MoeBlock
from moe_worker.models.mla import LatentAttention, QueryExpansion
from moe_worker.models.rope import attention_scale, rotation_table
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import Router


class TensorSource(Protocol):
    """Gives tensors by name, on one device and in one dtype."""

    device: torch.device
    dtype: torch.dtype

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Tensor `name`, which must have `shape`, in `dtype` (None: the source's own)."""
        ...


def build_model(config: ModelConfig, source: TensorSource, context: int) -> DeepseekModel:
    """Takes every tensor of the model once; `context` positions can be used afterwards."""
    d, vocabulary = config.hidden_size, config.vocab_size
    embedding_VD = source.take("model.embed_tokens.weight", vocabulary, d)
    return DeepseekModel(
        config=config,
        embedding_VD=embedding_VD,
        layers=tuple(_layer(config, source, index) for index in range(config.num_hidden_layers)),
        norm_D=source.take("model.norm.weight", d),
        head=DenseLinear(
            embedding_VD if config.tie_word_embeddings else source.take("lm_head.weight", vocabulary, d)
        ),
        rotations_CP=rotation_table(config, context, source.device),
    )


def _layer(config: ModelConfig, source: TensorSource, index: int) -> Layer:
    prefix, d = f"model.layers.{index}", config.hidden_size
    block = _dense if index < config.num_dense_layers else _moe
    return Layer(
        attention_norm_D=source.take(f"{prefix}.input_layernorm.weight", d),
        attention=_attention(config, source, f"{prefix}.self_attn"),
        block_norm_D=source.take(f"{prefix}.post_attention_layernorm.weight", d),
        block=block(config, source, f"{prefix}.mlp"),
    )


def _attention(config: ModelConfig, source: TensorSource, prefix: str) -> LatentAttention:
    d, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    plain, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query_rank, queries = config.q_lora_rank, heads * config.qk_head_dim
    if query_rank is None:
        first_OD = _interleave(config, source.take(f"{prefix}.q_proj.weight", queries, d), config.qk_head_dim)
        expansion = None
    else:
        first_OD = source.take(f"{prefix}.q_a_proj.weight", query_rank, d)
        norm_Q = source.take(f"{prefix}.q_a_layernorm.weight", query_rank)
        expand = source.take(f"{prefix}.q_b_proj.weight", queries, query_rank)
        expansion = QueryExpansion(norm_Q, DenseLinear(_interleave(config, expand, config.qk_head_dim)))
    latent_WD = source.take(f"{prefix}.kv_a_proj_with_mqa.weight", config.latent_width, d)
    expand_HOR = source.take(f"{prefix}.kv_b_proj.weight", heads * (plain + value), rank).view(
        heads, -1, rank
    )
    return LatentAttention(
        input=DenseLinear(
            torch.cat((first_OD, _interleave(config, latent_WD, config.latent_width))),
            _input_bias(config, source, prefix) if config.attention_bias else None,
        ),
        query=expansion,
        latent_norm_R=source.take(f"{prefix}.kv_a_layernorm.weight", rank),
        key_HNR=expand_HOR[:, :plain].contiguous(),
        value_HRV=expand_HOR[:, plain:].transpose(1, 2).contiguous(),
        output=DenseLinear(
            source.take(f"{prefix}.o_proj.weight", d, heads * value),
            source.take(f"{prefix}.o_proj.bias", d) if config.attention_bias else None,
        ),
        rope_width=rope,
        scale=attention_scale(config),
    )


def _input_bias(config: ModelConfig, source: TensorSource, prefix: str) -> Tensor:
    """Only the low-rank query projection has a bias; a full one is given zeros."""
    latent_W = _interleave(
        config, source.take(f"{prefix}.kv_a_proj_with_mqa.bias", config.latent_width), config.latent_width
    )
    if config.q_lora_rank is None:
        queries = config.num_attention_heads * config.qk_head_dim
        return torch.cat((latent_W.new_zeros(queries), latent_W))
    return torch.cat((source.take(f"{prefix}.q_a_proj.bias", config.q_lora_rank), latent_W))


def _interleave(config: ModelConfig, weight: Tensor, width: int) -> Tensor:
    """Puts the rotary rows (the last P of every `width`) into pairs, as `rotate` wants them.

    Checkpoints with rope_interleave false pair element i with i + P / 2 instead of its neighbour.
    """
    if config.rope_interleave:
        return weight
    rope = config.qk_rope_head_dim
    order = torch.arange(width, device=weight.device)
    order[-rope:] = order[-rope:].view(2, -1).t().flatten()
    return weight.view(-1, width, *weight.shape[1:]).index_select(1, order).flatten(0, 1)


def _dense(config: ModelConfig, source: TensorSource, prefix: str) -> DenseBlock:
    d, width = config.hidden_size, config.intermediate_size
    gate = source.take(f"{prefix}.gate_proj.weight", width, d)
    up = source.take(f"{prefix}.up_proj.weight", width, d)
    return DenseBlock(
        DenseLinear(torch.cat((gate, up))),
        DenseLinear(source.take(f"{prefix}.down_proj.weight", d, width)),
    )


def _moe(config: ModelConfig, source: TensorSource, prefix: str) -> MoeBlock:
    experts, d = config.n_routed_experts, config.hidden_size
    router = Router(
        weight_ED=source.take(f"{prefix}.gate.weight", experts, d, dtype=torch.float32),
        bias_E=source.take(f"{prefix}.gate.e_score_correction_bias", experts, dtype=torch.float32),
        groups=config.n_group,
        kept_groups=config.topk_group,
        top_k=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )
    return MoeBlock(router, _experts(config, source, prefix))


def _experts(config: ModelConfig, source: TensorSource, prefix: str) -> Experts:
    d, width, shared = config.hidden_size, config.moe_intermediate_size, config.n_shared_experts
    every = config.n_routed_experts + shared
    gate_up_AFD = torch.empty(every, 2 * width, d, dtype=source.dtype, device=source.device)
    down_ADI = torch.empty(every, d, width, dtype=source.dtype, device=source.device)
    for expert in range(config.n_routed_experts):
        name = f"{prefix}.experts.{expert}"
        gate_up_AFD[expert, :width] = source.take(f"{name}.gate_proj.weight", width, d)
        gate_up_AFD[expert, width:] = source.take(f"{name}.up_proj.weight", width, d)
        down_ADI[expert] = source.take(f"{name}.down_proj.weight", d, width)
    name = f"{prefix}.shared_experts"
    gate_up_AFD[-shared:, :width] = source.take(f"{name}.gate_proj.weight", shared * width, d).view(
        shared, width, d
    )
    gate_up_AFD[-shared:, width:] = source.take(f"{name}.up_proj.weight", shared * width, d).view(
        shared, width, d
    )
    down_DSI = source.take(f"{name}.down_proj.weight", d, shared * width).view(d, shared, width)
    down_ADI[-shared:] = down_DSI.transpose(0, 1)
    return Experts(gate_up_AFD, down_ADI, shared)
