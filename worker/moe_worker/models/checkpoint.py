"""Loads a Hugging Face checkpoint directory of DeepSeek-V3 architecture."""

import logging
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from moe_worker.config.model import ModelConfig
from moe_worker.errors import CheckpointError
from moe_worker.models.build import build_model
from moe_worker.models.deepseek import DeepseekModel
from moe_worker.models.safetensors import StoredTensor, stored_tensors

READABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")
log = logging.getLogger(__name__)


def load_model(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    context: int,
    progress: bool,
) -> DeepseekModel:
    """Reads the weights, checking every name, shape and size before the first byte of data.

    `progress` shows a bar in bytes on stderr. Raises CheckpointError.
    """
    stored = stored_tensors(directory)
    plan = _Plan(directory, stored, dtype)
    build_model(config, plan, context=1)
    _log_unused(config, set(stored) - plan.taken)
    total = sum(stored[name].nbytes for name in plan.taken)
    with (
        ExitStack() as files,
        tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc="loading weights",
            disable=not progress,
            file=sys.stderr,
        ) as bar,
    ):
        return build_model(config, _Reader(stored, dtype, device, files, bar.update), context)


class _Plan:
    """A source of tensors without data: finds out what the model takes, and whether it is there."""

    device = torch.device("meta")

    def __init__(self, directory: Path, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.taken: set[str] = set()
        self._directory = directory
        self._stored = stored

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self._stored.get(name)
        if tensor is None:
            raise CheckpointError(f"{self._directory}: tensor {name} is missing; its shape is {list(shape)}")
        wrong = _mismatch(tensor, shape)
        if wrong is not None:
            raise CheckpointError(f"{tensor.file}: tensor {name} {wrong}")
        self.taken.add(name)
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


def _mismatch(tensor: StoredTensor, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor, and what would be right; None if it can be used."""
    if tensor.shape != shape:
        return f"has shape {list(tensor.shape)}, but config.json needs {list(shape)}"
    if tensor.dtype not in READABLE:
        return f"is stored as {tensor.dtype}; it must be one of {', '.join(READABLE)}"
    needed = READABLE[tensor.dtype].itemsize * torch.Size(shape).numel()
    if tensor.nbytes != needed:
        return f"takes {tensor.nbytes} bytes in the file, but its shape needs {needed}; copy the file again"
    return None


class _Reader:
    """Reads tensors from memory-mapped files, one at a time."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        device: torch.device,
        files: ExitStack,
        advance: Callable[[int], object],
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._stored = stored
        self._files = files
        self._advance = advance
        self._open: dict[Path, safe_open] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG002
        tensor = self._stored[name]
        try:
            if tensor.file not in self._open:
                self._open[tensor.file] = self._files.enter_context(safe_open(tensor.file, framework="pt"))
            value: Tensor = self._open[tensor.file].get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} cannot be read ({error}); copy the file again"
            ) from error
        self._advance(tensor.nbytes)
        return value.to(device=self.device, dtype=dtype or self.dtype, copy=True)


def _log_unused(config: ModelConfig, names: set[str]) -> None:
    """Says what is left out: multi-token prediction layers by name, anything else as a warning."""
    prediction = {int(match[1]) for name in names if (match := LAYER_NAME.match(name))}
    prediction = {layer for layer in prediction if layer >= config.num_hidden_layers}
    if prediction:
        log.info(
            "skipping multi-token prediction layers %s: they are not needed to generate", sorted(prediction)
        )
    others = sorted(name for name in names if not ((m := LAYER_NAME.match(name)) and int(m[1]) in prediction))
    if config.tie_word_embeddings:
        others = [name for name in others if name != "lm_head.weight"]
    if others:
        log.warning("ignoring %d tensors the model does not have, the first is %s", len(others), others[0])
