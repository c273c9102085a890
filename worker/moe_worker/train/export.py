"""Writes a checkpoint directory as Hugging Face's DeepSeek-V3 has it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from moe_worker.train.data import BEGIN_OF_TEXT, END_OF_TEXT
from moe_worker.train.model import TrainingModel, checkpoint_tensors


def write_checkpoint(folder: Path, config: Path, model: TrainingModel, tokenizer: Tokenizer) -> None:
    """Writes config.json, tokenizer.json, tokenizer_config.json and model.safetensors (bfloat16).

    The routers' balancing bias stays in float32, as published: it is compared, not multiplied.
    """
    tensors = {
        name: tensor.detach().cpu().to(torch.float32 if "bias" in name else torch.bfloat16).contiguous()
        for name, tensor in checkpoint_tensors(model).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    shape = {**json.loads(config.read_text()), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
