"""Names of the model's tensors in training and in published checkpoints."""

from __future__ import annotations

import torch

from moe_worker.errors import CheckpointError
from moe_worker.train.model import TrainingModel


def named_tensors(state: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """The tensors of a model's state under the names of Hugging Face's DeepSeek-V3 checkpoints."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        names = checkpoint_names(name, experts)
        tensors |= zip(names, tensor if len(names) > 1 else [tensor], strict=True)
    return tensors


def load_checkpoint_tensors(model: TrainingModel, tensors: dict[str, torch.Tensor]) -> None:
    """Loads the weights of a checkpoint of the same shape.

    Raises CheckpointError if a tensor is missing or has another shape.
    """
    for name, tensor in untied_state(model).items():
        names = checkpoint_names(name, model.config.moe.routed)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise CheckpointError(f"the checkpoint to start from has no {missing[0]}; it is of another shape")
        given = torch.stack([tensors[name] for name in names]) if len(names) > 1 else tensors[names[0]]
        if given.shape != tensor.shape:
            raise CheckpointError(
                f"{names[0]} of the checkpoint to start from has shape {tuple(given.shape)}, "
                f"where --config asks for {tuple(tensor.shape)}"
            )
        tensor.copy_(given)


def untied_state(model: TrainingModel) -> dict[str, torch.Tensor]:
    """The model's state without the output head if that is tied to the embedding."""
    state: dict[str, torch.Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def checkpoint_names(name: str, experts: int) -> list[str]:
    """Names in a checkpoint for one tensor of the model: one, or one per expert."""
    layer, _, kind = name.rpartition(".mlp.")
    prefix = f"model.{layer}.mlp"
    match kind:
        case "router_ED":
            return [f"{prefix}.gate.weight"]
        case "bias_E":
            return [f"{prefix}.gate.e_score_correction_bias"]
        case "gate_EFD" | "up_EFD" | "down_EDF":
            projection = kind.split("_")[0] + "_proj"
            return [f"{prefix}.experts.{expert}.{projection}.weight" for expert in range(experts)]
        case _ if name == "lm_head.weight":
            return [name]
        case _:
            return ["model." + name.replace(".mlp.shared.", ".mlp.shared_experts.")]
