"""Prunes the layers, heads, experts and channels that contribute least to the loss.

Legend: E routed experts, D hidden size, F channels of an expert, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_worker.compress.taylor import Importance, change
from moe_worker.config.directory import read_json
from moe_worker.config.model import parse_model_config
from moe_worker.progress import bar
from moe_worker.train.blocks import (
    FeedForward,
    MixtureOfExperts,
    TrainingAttention,
    TrainingLayer,
)
from moe_worker.train.data import WindowSampler, read_tokenizer
from moe_worker.train.export import save_directory, stored
from moe_worker.train.model import TrainingModel
from moe_worker.train.names import load_checkpoint_tensors, named_tensors, untied_state
from moe_worker.train.sizes import ModelSizes
from moe_worker.train.state import read_tensors

State = dict[str, Tensor]


def prune_checkpoint(
    source: Path, target: Path, goal: ModelSizes, sampler: WindowSampler, batches: int
) -> None:
    """Writes a smaller checkpoint of the same architecture to the folder `target`.

    Importance is measured over the first `batches` batches of `sampler`, on the device of its tokens. Raises
    SettingsError for impossible sizes, CheckpointError for a checkpoint that cannot be read.
    """
    config = read_json(source / "config.json")
    ModelSizes.of(config).check(goal, config)
    model = TrainingModel(parse_model_config(config, str(source / "config.json")), dropout=0.0)
    load_checkpoint_tensors(model, read_tensors(source / "model.safetensors"))
    model.to(sampler.tokens_N.device)
    steps = bar(range(batches), desc="measuring importance", unit="batch")
    importance = measure(model, map(sampler.at, steps))
    state, smaller = cut(model, config, importance, goal)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: stored(name, tensor) for name, tensor in named_tensors(state, goal.experts).items()}
    save_directory(target, smaller, tensors, read_tokenizer(source / "tokenizer.json"))


def measure(model: TrainingModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Importance:
    """The importance of every part, under the names that `cut` uses."""
    importance = Importance()
    model.eval()
    for inputs, targets in batches:
        model.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            loss = model(inputs, targets)
        loss.backward()
        importance.add(_changes(model))
    model.zero_grad(set_to_none=True)
    return importance


def _changes(model: TrainingModel) -> State:
    found: State = {}
    layers = [layer for layer in model.layers if isinstance(layer, TrainingLayer)]
    found["layers"] = torch.stack([_sum(layer) for layer in layers])
    for index, layer in enumerate(layers):
        found[f"{index}.heads"] = _heads(layer.self_attn)
        if isinstance(layer.mlp, MixtureOfExperts):
            of_channels_EF = _channels(layer.mlp.gate_EFD, layer.mlp.up_EFD, layer.mlp.down_EDF)
            found[f"{index}.channels"] = of_channels_EF
            found[f"{index}.experts"] = of_channels_EF.sum(dim=-1)
            found[f"{index}.shared"] = _channels_of(layer.mlp.shared)
        else:
            found[f"{index}.dense"] = _channels_of(layer.mlp)
    return found


def _sum(layer: TrainingLayer) -> Tensor:
    return torch.stack([change(weight).sum() for weight in layer.parameters() if weight.dim() > 1]).sum()


def _heads(attention: TrainingAttention) -> Tensor:
    """By the columns of the output projection, which carry the whole output of a head: [H]."""
    heads = attention.config.latent.num_attention_heads
    by_head: Tensor = change(attention.o_proj.weight).unflatten(1, (heads, -1))
    return by_head.sum(dim=(0, 2))


def _channels(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return change(gate).sum(dim=-1) + change(up).sum(dim=-1) + change(down).sum(dim=-2)


def _channels_of(block: FeedForward) -> Tensor:
    return _channels(block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight)


def cut(
    model: TrainingModel, config: dict[str, Any], importance: Importance, goal: ModelSizes
) -> tuple[State, dict[str, Any]]:
    """The state and config.json of the smaller model. Dense layers stay: they are the first ones."""
    state = untied_state(model)
    dense = len(model.config.dense_layers)
    smaller = {name: tensor for name, tensor in state.items() if not name.startswith("layers.")}
    for new, old in enumerate(_kept_layers(importance, dense, goal.layers)):
        prefix = f"layers.{old}."
        layer = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        layer |= _cut_heads(layer, model, importance.best(f"{old}.heads", goal.heads))
        if old < dense:
            layer |= _cut_block(layer, "mlp", importance.best(f"{old}.dense", goal.dense_channels))
        else:
            layer |= _cut_experts(layer, config, importance, old, goal)
        smaller |= {f"layers.{new}.{name}": tensor for name, tensor in layer.items()}
    return smaller, goal.write(config)


def _kept_layers(importance: Importance, dense: int, count: int) -> list[int]:
    worth = importance["layers"].clone()
    worth[:dense] = float("inf")
    order = worth.argsort(descending=True, stable=True)[:count]
    return sorted(int(layer) for layer in order)


def _cut_heads(layer: State, model: TrainingModel, kept_H: Tensor) -> State:
    """Cuts rows of the query and of the latent expansion, and columns of the output."""
    heads = model.config.latent.num_attention_heads
    query = "self_attn.q_proj.weight" if "self_attn.q_proj.weight" in layer else "self_attn.q_b_proj.weight"
    rows = {
        name: layer[name].unflatten(0, (heads, -1))[kept_H].flatten(0, 1)
        for name in (query, "self_attn.kv_b_proj.weight")
    }
    output = layer["self_attn.o_proj.weight"].unflatten(1, (heads, -1))[:, kept_H].flatten(1)
    return {**rows, "self_attn.o_proj.weight": output}


def _cut_block(layer: State, name: str, kept: Tensor) -> State:
    return {
        f"{name}.gate_proj.weight": layer[f"{name}.gate_proj.weight"][kept],
        f"{name}.up_proj.weight": layer[f"{name}.up_proj.weight"][kept],
        f"{name}.down_proj.weight": layer[f"{name}.down_proj.weight"][:, kept],
    }


def _cut_experts(
    layer: State, config: dict[str, Any], importance: Importance, old: int, goal: ModelSizes
) -> State:
    """Keeps equally many experts of each group, and the best channels of each expert."""
    groups, shared = int(config.get("n_group", 1)), int(config["n_shared_experts"])
    worth_GE = importance[f"{old}.experts"].unflatten(0, (groups, -1))
    best_GE = worth_GE.argsort(dim=1, descending=True, stable=True)[:, : goal.experts // groups]
    first_G1 = torch.arange(groups, device=best_GE.device).unsqueeze(1) * worth_GE.shape[1]
    experts = (best_GE.sort(dim=1).values + first_G1).flatten()
    channels_EF = importance.best(f"{old}.channels", goal.channels)[experts]
    result = {name: layer[name][experts] for name in ("mlp.router_ED", "mlp.bias_E")}
    for name in ("mlp.gate_EFD", "mlp.up_EFD"):
        index = channels_EF.unsqueeze(-1).expand(-1, -1, layer[name].shape[-1])
        result[name] = layer[name][experts].gather(1, index)
    down = layer["mlp.down_EDF"][experts]
    result["mlp.down_EDF"] = down.gather(2, channels_EF.unsqueeze(1).expand(-1, down.shape[1], -1))
    kept = importance.best(f"{old}.shared", goal.channels * shared)
    return result | _cut_block(layer, "mlp.shared", kept)
