"""Sparse matrices and checkpoints for tests, made with the library's own masks from random numbers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_worker.compress.sparsity import mask_keeping
from moe_worker.quant import sparse14
from moe_worker.quant.int4 import quantize_int4


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_sparse(*shape, group=64, seed=0):
    """The best of every four random weights, in four bits."""
    weight = random(*shape, seed=seed)
    return sparse14.from_int4(quantize_int4(weight * mask_keeping(weight.abs(), 1), group))


def make_sparse(source: Path, target: Path, group: int = 64) -> Path:
    """Prunes and packs a dense checkpoint's projections (not kv_b_proj, not routers) as s14."""
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        inside = ".self_attn." in name or ".mlp." in name
        if tensor.dim() < 2 or not inside or "kv_b_proj" in name or "mlp.gate.weight" in name:
            tensors[name] = tensor
            continue
        pruned = tensor.float() * mask_keeping(tensor.abs(), 1)
        packed = sparse14.to_tensors(sparse14.from_int4(quantize_int4(pruned, group)))
        tensors |= {name.removesuffix("weight") + part: value for part, value in packed.items()}
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = sparse14.quantization_config(group)
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    return target
