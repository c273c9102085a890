"""Builds the two kinds of attention from tensors named as in Hugging Face checkpoints.

Legend: D hidden, H heads, O outputs, Q query rank, N query elements without and P with rotary position, R
latent rank, W latent and rotary key elements, V value elements of a head, K elements of a head.
"""

import torch
from torch import Tensor

from moe_worker.config.attention import GroupedConfig, LatentConfig, RopeConfig
from moe_worker.kernels.linear import Linear
from moe_worker.models.gqa import GroupedQueryAttention
from moe_worker.models.mla import LatentAttention, QueryExpansion
from moe_worker.models.rope import attention_scale
from moe_worker.models.source import TensorSource, piece_for
from moe_worker.quant.int8 import round_columns
from moe_worker.quant.matrix import Matrix, join_rows


def latent_attention(config: LatentConfig, d: int, source: TensorSource, prefix: str) -> LatentAttention:
    """DeepSeek's attention over `d` hidden elements."""
    heads, rank, plain = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    first_OD, expansion = _query(config, d, source, prefix)
    latent_WD = source.matrix(f"{prefix}.kv_a_proj_with_mqa.weight", config.cache_width, d)
    expand_OR = source.take(f"{prefix}.kv_b_proj.weight", heads * (plain + config.v_head_dim), rank)
    if source.round_tokens:  # the same int8 whatever the dtype of the model
        expand_OR = expand_OR.bfloat16().to(expand_OR.dtype)
    key_HNR, value_HVR = expand_OR.view(heads, -1, rank).tensor_split([plain], dim=1)
    value_HRV = value_HVR.transpose(1, 2)
    if source.round_tokens:
        key_HNR, value_HRV = round_columns(key_HNR, 1), round_columns(value_HRV, 1)
    return LatentAttention(
        input=Linear(
            join_rows((first_OD, _interleaved(config.rope, latent_WD, config.cache_width))),
            _input_bias(config, source, prefix) if config.attention_bias else None,
            piece_for(source, d),
        ),
        query=expansion,
        latent_norm_R=source.take(f"{prefix}.kv_a_layernorm.weight", rank),
        key_HNR=key_HNR.contiguous(),
        value_HRV=value_HRV.contiguous(),
        output=_output(d, (heads, config.v_head_dim), config.attention_bias, source, prefix),
        rope_width=config.qk_rope_head_dim,
        scale=attention_scale(config.rope, config.qk_head_dim),
        round_inputs=source.round_tokens,
    )


def _query(
    config: LatentConfig, d: int, source: TensorSource, prefix: str
) -> tuple[Matrix, QueryExpansion | None]:
    """The part of the query projection that reads hidden states, and the second part if there are two."""
    rank, queries = config.q_lora_rank, config.num_attention_heads * config.qk_head_dim
    if rank is None:
        whole_OD = source.matrix(f"{prefix}.q_proj.weight", queries, d)
        return _interleaved(config.rope, whole_OD, config.qk_head_dim), None
    first_QD = source.matrix(f"{prefix}.q_a_proj.weight", rank, d)
    norm_Q = source.take(f"{prefix}.q_a_layernorm.weight", rank)
    expand_OQ = source.matrix(f"{prefix}.q_b_proj.weight", queries, rank)
    expand_OQ = _interleaved(config.rope, expand_OQ, config.qk_head_dim)
    return first_QD, QueryExpansion(norm_Q, Linear(expand_OQ, None, piece_for(source, rank)))


def _input_bias(config: LatentConfig, source: TensorSource, prefix: str) -> Tensor:
    """Only the low-rank query projection has a bias; a full one is given zeros."""
    bias_W = source.take(f"{prefix}.kv_a_proj_with_mqa.bias", config.cache_width)
    latent_W = interleave(config.rope, bias_W, config.cache_width)
    if config.q_lora_rank is None:
        return torch.cat((latent_W.new_zeros(config.num_attention_heads * config.qk_head_dim), latent_W))
    return torch.cat((source.take(f"{prefix}.q_a_proj.bias", config.q_lora_rank), latent_W))


def grouped_attention(
    config: GroupedConfig, d: int, eps: float, source: TensorSource, prefix: str
) -> GroupedQueryAttention:
    """Qwen3's attention over `d` hidden elements."""
    width, heads, keys = config.head_dim, config.num_attention_heads, config.num_key_value_heads

    def matrix(name: str, count: int) -> Matrix:
        taken = source.matrix(f"{prefix}.{name}.weight", count * width, d)
        return taken if name == "v_proj" else _interleaved(config.rope, taken, width)

    def vector(name: str, count: int) -> Tensor:
        taken = source.take(f"{prefix}.{name}", count * width)
        return taken if name.startswith("v_") else interleave(config.rope, taken, width)

    counts = {"q_proj": heads, "k_proj": keys, "v_proj": keys}
    weight_OD = join_rows([matrix(name, count) for name, count in counts.items()])
    bias_O = None
    if config.attention_bias:
        bias_O = torch.cat([vector(f"{name}.bias", count) for name, count in counts.items()])
    return GroupedQueryAttention(
        input=Linear(weight_OD, bias_O, piece_for(source, d)),
        query_norm_K=vector("q_norm.weight", 1),
        key_norm_K=vector("k_norm.weight", 1),
        output=_output(d, (heads, width), config.attention_bias, source, prefix),
        key_heads=keys,
        norm_eps=eps,
        scale=attention_scale(config.rope, width),
    )


def _output(d: int, values: tuple[int, int], has_bias: bool, source: TensorSource, prefix: str) -> Linear:
    """Over `values`, heads and width of each; no piece of its int8 activations lies in two heads."""
    heads, width = values
    bias_D = source.take(f"{prefix}.o_proj.bias", d) if has_bias else None
    matrix = source.matrix(f"{prefix}.o_proj.weight", d, heads * width)
    return Linear(matrix, bias_D, piece_for(source, width))


def _interleaved(rope: RopeConfig, matrix: Matrix, width: int) -> Matrix:
    return matrix.map(lambda rows: interleave(rope, rows, width))


def interleave(rope: RopeConfig, weight: Tensor, width: int) -> Tensor:
    """Puts the rotary rows (the last ones of every `width`) into pairs, as `rotate` wants them.

    Checkpoints that are not interleaved pair element i with i + P / 2 instead of its neighbour.
    """
    if rope.interleaved:
        return weight
    order = torch.arange(width, device=weight.device)
    order[-rope.width :] = order[-rope.width :].view(2, -1).t().flatten()
    return weight.view(-1, width, *weight.shape[1:]).index_select(1, order).flatten(0, 1)
