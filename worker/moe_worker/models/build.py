"""Builds a model from tensors named as in Hugging Face checkpoints of its family.

Legend: D hidden, H heads, O outputs, I inputs, E routed experts, S shared experts, A all experts.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from moe_worker.config.attention import LatentConfig
from moe_worker.config.model import ModelConfig
from moe_worker.errors import CheckpointError
from moe_worker.kernels.linear import Linear
from moe_worker.models.attention_build import grouped_attention, latent_attention
from moe_worker.models.deepseek import DeepseekModel, DenseBlock, MoeBlock, TorchLayer
from moe_worker.models.layers import Layer, Sublayer
from moe_worker.models.memory import give_back_freed
from moe_worker.models.rope import rotation_table
from moe_worker.models.source import TensorSource, piece_for
from moe_worker.models.stage import Stage
from moe_worker.moe.experts import Experts
from moe_worker.moe.router import Router
from moe_worker.quant.int8 import WHOLE_PIECE
from moe_worker.quant.matrix import Dense, Matrix, join_rows, stack


def build_model(
    config: ModelConfig, source: TensorSource, context: int, stage: Stage | None = None
) -> DeepseekModel:
    """Builds a stage (None: the whole model) for up to `context` positions."""
    stage = stage or Stage.whole(config.num_hidden_layers)
    v, d = config.vocab_size, config.hidden_size
    none_ND = torch.empty(0, d, dtype=source.dtype, device=source.device)
    return DeepseekModel(
        config=config,
        stage=stage,
        embedding_VD=source.take("model.embed_tokens.weight", v, d) if stage.first else none_ND,
        layers=list(_layers(config, source, stage)),
        norm_D=source.take("model.norm.weight", d) if stage.last else none_ND[:, 0],
        head=Linear(_head(config, source) if stage.last else Dense(none_ND), None, piece_for(source, d)),
        rotations_CP=rotation_table(config.attention.rope, context, source.device),
    )


def _head(config: ModelConfig, source: TensorSource) -> Matrix:
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return source.matrix(name, config.vocab_size, config.hidden_size)


def _layers(config: ModelConfig, source: TensorSource, stage: Stage) -> Iterator[TorchLayer]:
    for index in stage.layers:
        yield _layer(config, source, stage, index)
        give_back_freed()


def _layer(config: ModelConfig, source: TensorSource, stage: Stage, index: int) -> TorchLayer:
    prefix, d = f"model.layers.{index}", config.hidden_size
    mlp = f"{prefix}.mlp"
    dense = index in config.dense_layers
    return Layer(
        attention_norm=source.take(f"{prefix}.input_layernorm.weight", d),
        attention=_attention(config, source, f"{prefix}.self_attn"),
        block_norm=source.take(f"{prefix}.post_attention_layernorm.weight", d),
        block=_dense(config, source, mlp) if dense else _moe(config, source, mlp, stage, index),
    )


def _attention(config: ModelConfig, source: TensorSource, prefix: str) -> Sublayer:
    if isinstance(config.attention, LatentConfig):
        return latent_attention(config.attention, config.hidden_size, source, prefix)
    return grouped_attention(config.attention, config.hidden_size, config.rms_norm_eps, source, prefix)


def _dense(config: ModelConfig, source: TensorSource, prefix: str) -> DenseBlock:
    d, width = config.hidden_size, config.intermediate_size
    gate_up = join_rows([source.matrix(f"{prefix}.{part}_proj.weight", width, d) for part in ("gate", "up")])
    down = source.matrix(f"{prefix}.down_proj.weight", d, width)
    # The kernels of GPUs cut a dense block into experts of whole groups, so its pieces are whole, too.
    inner = piece_for(source, WHOLE_PIECE)
    return DenseBlock(Linear(gate_up, None, piece_for(source, d)), Linear(down, None, inner))


def _moe(config: ModelConfig, source: TensorSource, prefix: str, stage: Stage, index: int) -> MoeBlock:
    experts, d = config.moe.routed, config.hidden_size
    bias_E = None
    if config.moe.has_bias:
        bias_E = source.take(f"{prefix}.gate.e_score_correction_bias", experts, dtype=torch.float32)
    weight_ED = source.take(f"{prefix}.gate.weight", experts, d, dtype=torch.float32)
    held = stage.experts.get(index, range(experts))
    router = Router(weight_ED, bias_E, config.moe.routing)
    return MoeBlock(router, build_experts(config, source, index, held), stage.dispatch(index))


def build_experts(
    config: ModelConfig, source: TensorSource, layer: int, held: Sequence[int],
    rest: Callable[[], object] | None = None, shared: bool = True,
) -> Experts:  # fmt: skip
    """The routed experts `held` of a layer, in this order, and the shared ones if `shared`.

    rest: called after each matrix is copied to its place.
    """
    prefix = f"model.layers.{layer}.mlp"
    experts = [_expert(config, source, f"{prefix}.experts.{expert}", shared=1) for expert in held]
    if shared and config.moe.shared:
        experts.append(_expert(config, source, f"{prefix}.shared_experts", config.moe.shared))
    gate_up = stack([matrix for matrices, _ in experts for matrix in matrices], rest)
    down = stack([matrix for _, matrices in experts for matrix in matrices], rest)
    return Experts(gate_up, down, source.round_tokens)


def _expert(
    config: ModelConfig, source: TensorSource, name: str, shared: int
) -> tuple[list[Matrix], list[Matrix]]:
    """Matrices of one expert: gate and up, and down; of several experts if the checkpoint stores them as one
    block.
    """
    d, width = config.hidden_size, config.moe.intermediate
    gate, up = (source.matrix(f"{name}.{part}_proj.weight", shared * width, d) for part in ("gate", "up"))
    down = source.matrix(f"{name}.down_proj.weight", d, shared * width)
    try:
        downs = down.split_inputs(shared)
    except ValueError as error:
        raise CheckpointError(
            f"{name}.down_proj.weight: {error}; load it with format dense, or quantize it with smaller groups"
        ) from error
    return [join_rows((_part(gate, i, width), _part(up, i, width))) for i in range(shared)], downs


def _part(matrix: Matrix, index: int, width: int) -> Matrix:
    return matrix.map(lambda rows: rows[index * width : (index + 1) * width])
