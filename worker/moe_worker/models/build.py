"""Builds a model from tensors named as in Hugging Face checkpoints of its family.

Legend: D hidden, H heads, O outputs, I inputs, E routed experts, S shared experts, A all experts.
"""

import torch
from torch import Tensor

from moe_worker.config.attention import LatentConfig
from moe_worker.config.model import ModelConfig
from moe_worker.kernels.linear import DenseLinear
from moe_worker.models.attention import Attention
from moe_worker.models.attention_build import grouped_attention, latent_attention
from moe_worker.models.deepseek import DeepseekModel, DenseBlock, Layer, MoeBlock
from moe_worker.models.rope import rotation_table
from moe_worker.models.source import TensorSource
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import Router


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
        rotations_CP=rotation_table(config.attention.rope, context, source.device),
    )


def _layer(config: ModelConfig, source: TensorSource, index: int) -> Layer:
    prefix, d = f"model.layers.{index}", config.hidden_size
    block = _dense if index in config.dense_layers else _moe
    return Layer(
        attention_norm_D=source.take(f"{prefix}.input_layernorm.weight", d),
        attention=_attention(config, source, f"{prefix}.self_attn"),
        block_norm_D=source.take(f"{prefix}.post_attention_layernorm.weight", d),
        block=block(config, source, f"{prefix}.mlp"),
    )


def _attention(config: ModelConfig, source: TensorSource, prefix: str) -> Attention:
    if isinstance(config.attention, LatentConfig):
        return latent_attention(config.attention, config.hidden_size, source, prefix)
    return grouped_attention(config.attention, config.hidden_size, config.rms_norm_eps, source, prefix)


def _dense(config: ModelConfig, source: TensorSource, prefix: str) -> DenseBlock:
    d, width = config.hidden_size, config.intermediate_size
    gate = source.take(f"{prefix}.gate_proj.weight", width, d)
    up = source.take(f"{prefix}.up_proj.weight", width, d)
    return DenseBlock(
        DenseLinear(torch.cat((gate, up))),
        DenseLinear(source.take(f"{prefix}.down_proj.weight", d, width)),
    )


def _moe(config: ModelConfig, source: TensorSource, prefix: str) -> MoeBlock:
    experts, d = config.moe.routed, config.hidden_size
    bias_E = None
    if config.moe.has_bias:
        bias_E = source.take(f"{prefix}.gate.e_score_correction_bias", experts, dtype=torch.float32)
    weight_ED = source.take(f"{prefix}.gate.weight", experts, d, dtype=torch.float32)
    return MoeBlock(Router(weight_ED, bias_E, config.moe), _experts(config, source, prefix))


def _experts(config: ModelConfig, source: TensorSource, prefix: str) -> Experts:
    d, width = config.hidden_size, config.moe.intermediate
    every = config.moe.routed + config.moe.shared
    gate_up_AFD = torch.empty(every, 2 * width, d, dtype=source.dtype, device=source.device)
    down_ADI = torch.empty(every, d, width, dtype=source.dtype, device=source.device)
    for expert in range(config.moe.routed):
        name = f"{prefix}.experts.{expert}"
        gate_up_AFD[expert, :width] = source.take(f"{name}.gate_proj.weight", width, d)
        gate_up_AFD[expert, width:] = source.take(f"{name}.up_proj.weight", width, d)
        down_ADI[expert] = source.take(f"{name}.down_proj.weight", d, width)
    if config.moe.shared:
        _fill_shared(config, source, f"{prefix}.shared_experts", gate_up_AFD, down_ADI)
    return Experts(gate_up_AFD, down_ADI, config.moe.shared)


def _fill_shared(
    config: ModelConfig, source: TensorSource, name: str, gate_up_AFD: Tensor, down_ADI: Tensor
) -> None:
    """The checkpoint holds the shared experts as one wide block: experts that add up."""
    d, width, shared = config.hidden_size, config.moe.intermediate, config.moe.shared
    gate_OD = source.take(f"{name}.gate_proj.weight", shared * width, d)
    up_OD = source.take(f"{name}.up_proj.weight", shared * width, d)
    down_DO = source.take(f"{name}.down_proj.weight", d, shared * width)
    gate_up_AFD[-shared:, :width] = gate_OD.view(shared, width, d)
    gate_up_AFD[-shared:, width:] = up_OD.view(shared, width, d)
    down_ADI[-shared:] = down_DO.view(d, shared, width).transpose(0, 1)
