"""Writes a checkpoint directory in the layout of Hugging Face's DeepSeek-V3, compressed as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from moe_worker.compress.w4a8 import pack_weight
from moe_worker.config.directory import read_json
from moe_worker.files import replacing, write_text
from moe_worker.quant import compressed_tensors, sparse14
from moe_worker.quant.int4 import Int4Weight
from moe_worker.train.compression import HEAD
from moe_worker.train.data import BEGIN_OF_TEXT, END_OF_TEXT
from moe_worker.train.learner import Learner
from moe_worker.train.names import checkpoint_names, named_tensors, untied_state
from moe_worker.train.settings import TrainSettings


def write_checkpoint(settings: TrainSettings, learner: Learner, tokenizer: Tokenizer) -> None:
    """Writes config.json, tokenizer.json, tokenizer_config.json and model.safetensors into the run's folder.

    Weights are bfloat16, masked ones zero. Matrices trained in int4 are packed: in the layout s14 if they
    keep one of four inputs, otherwise in that of compressed-tensors. The balancing bias of routers stays
    float32, as published: it is compared, not multiplied.
    """
    config: dict[str, Any] = {**read_json(settings.config), "torch_dtype": "bfloat16"}
    if learner.compression.int4 is None:
        config.pop("quantization_config", None)
        tensors = dense_tensors(learner)
    else:
        tensors = packed_tensors(learner, sparse=settings.sparsity == "s14")
        config |= {"tie_word_embeddings": False, "quantization_config": _quantization(settings)}
    save_directory(settings.out, config, tensors, tokenizer)


def save_directory(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Writes the files of a checkpoint, each atomically."""
    with replacing(folder / "model.safetensors") as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    special = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(special, indent=2) + "\n")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def dense_tensors(learner: Learner) -> dict[str, Tensor]:
    """Every weight in bfloat16 under its published name, masked where the run masks it."""
    state = untied_state(learner.model) | learner.effective()
    return {
        name: stored(name, tensor)
        for name, tensor in named_tensors(state, learner.model.config.moe.routed).items()
    }


@torch.no_grad()
def packed_tensors(learner: Learner, sparse: bool) -> dict[str, Tensor]:
    """As `dense_tensors`, with the matrices trained in int4 packed; the head has its own tensor.

    kv_b_proj has its rounded values, which bfloat16 represents exactly.
    """
    int4, experts = learner.compression.int4, learner.model.config.moe.routed
    if int4 is None:
        raise ValueError("this run trained no weights in four bits")
    state = learner.model.state_dict()
    masked = learner.compression.masked(learner.step_done, state)
    weights = {**state, **masked, **learner.compression.rounded_heads(state)}
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in int4.names:
            tensors |= {
                key: stored(key, value) for key, value in named_tensors({name: weight}, experts).items()
            }
            continue
        packed = pack_weight(weight, int4.scales(name), int4.group)
        keys = checkpoint_names(name, experts)
        for index, key in enumerate(keys):
            one = packed[index] if len(keys) > 1 else packed
            layout = _sparse if sparse and name != HEAD else compressed_tensors.to_tensors
            stem = key.removesuffix("weight")
            tensors |= {stem + part: value.cpu().contiguous() for part, value in layout(one).items()}
    return tensors


def stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor as checkpoints store it: on the CPU, bfloat16 except for the bias of routers."""
    dtype = torch.float32 if "bias" in name else torch.bfloat16
    return tensor.detach().cpu().to(dtype).contiguous()


def _sparse(weight: Int4Weight) -> dict[str, Tensor]:
    return sparse14.to_tensors(sparse14.from_int4(weight))


def _quantization(settings: TrainSettings) -> dict[str, Any]:
    if settings.sparsity == "s14":
        return sparse14.quantization_config(settings.group)
    ignore = ["re:.*kv_b_proj$", "re:.*mlp.gate$"]
    return compressed_tensors.quantization_config(settings.group, symmetric=True, ignore=ignore)
