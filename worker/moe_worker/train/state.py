"""The state of a run for resuming it, in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from moe_worker.errors import CheckpointError
from moe_worker.files import replacing
from moe_worker.reading import open_file


def save_state(
    path: Path, step: int, model: nn.Module, optimizers: list[Optimizer], fingerprint: str
) -> None:
    """Writes weights, optimizer state and random state, atomically."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{parameter}.{key}": value for key, value in values.items()}
    tensors |= {f"random.{name}": state for name, state in _random_states(model).items()}
    unshared = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        save_file(unshared, beside, metadata={"step": json.dumps(step), "fingerprint": fingerprint})


def load_state(path: Path, model: nn.Module, optimizers: list[Optimizer], fingerprint: str) -> int:
    """Restores the state that `save_state` wrote and returns the next step.

    Raises CheckpointError if the file is damaged or belongs to a run with other settings.
    """
    open_file(path).close()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it to start again") from error
    if metadata.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path}: belongs to a run with other settings; train with the same ones, or into another --out"
        )
    model.load_state_dict(_below(tensors, "model."))
    for index, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below(tensors, f"optimizer.{index}.").items():
            parameter, key = name.split(".", 1)
            state.setdefault(int(parameter), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    random = _below(tensors, "random.")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return int(json.loads(metadata["step"]))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file.

    Raises CheckpointError if it is missing or damaged.
    """
    open_file(path).close()
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give a checkpoint directory") from error


def _random_states(model: nn.Module) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
