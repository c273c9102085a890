"""Loads a Hugging Face checkpoint directory."""

import logging
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_worker.config.model import ModelConfig
from moe_worker.config.quantization import Storage
from moe_worker.errors import CheckpointError
from moe_worker.models.build import build_experts, build_model
from moe_worker.models.deepseek import DeepseekModel
from moe_worker.models.layouts import check_names
from moe_worker.models.memory import describe, weight_memory
from moe_worker.models.safetensors import StoredTensor, stored_tensors
from moe_worker.models.stage import Stage
from moe_worker.models.stored import DTYPES, Placement, StoredSource
from moe_worker.moe.experts import Experts
from moe_worker.progress import bar, tell
from moe_worker.quant.matrix import Dense, Matrix
from moe_worker.reading import open_file

LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")
log = logging.getLogger(__name__)


def load_model(
    directory: Path, config: ModelConfig, placement: Placement, context: int, progress: bool,
    stage: Stage | None = None,
) -> DeepseekModel:  # fmt: skip
    """Reads the weights of a stage (None: of the whole model). Checks names, shapes and sizes before it reads
    data.

    `progress` shows a bar in bytes on stderr. Raises CheckpointError.
    """
    stored = stored_tensors(directory)
    check_names(directory, stored)
    plan = _Plan(directory, stored, config.storage, placement)
    build_model(config, plan, context=1, stage=stage)
    if stage is None:
        _log_unused(config, set(stored) - plan.names)
    with bar(
        total=plan.nbytes, unit="B", unit_scale=True, desc="loading weights", disable=not progress
    ) as read:
        reader = _Reader(directory, stored, config.storage, placement)
        reader.attach(read.update)
        model = build_model(config, reader, context, stage)
    _tell_memory(model, progress)
    return model


class ExpertReader:
    """Reads experts of single layers, for a process that holds other ones than at its start."""

    def __init__(self, directory: Path, config: ModelConfig, placement: Placement) -> None:
        self._directory, self._config, self._placement = directory, config, placement
        self._stored = stored_tensors(directory)

    def read(
        self, layer: int, held: Sequence[int], rest: Callable[[], object], shared: bool = True
    ) -> Experts:
        """The routed experts `held` of a layer, and the shared ones if `shared`. `rest` is called between
        matrices.

        Raises CheckpointError.
        """
        reader = _Reader(self._directory, self._stored, self._config.storage, self._placement)
        reader.attach(lambda _: rest())
        return build_experts(self._config, reader, layer, held, rest, shared)


def _tell_memory(model: DeepseekModel, progress: bool) -> None:
    sentence = f"weights in memory: {describe(weight_memory(model))}"
    if progress:
        tell(sentence)
    else:
        log.info(sentence)


class _Plan(StoredSource):
    """A dry run with dense tensors without data: finds and checks the tensors that the model needs."""

    def __init__(
        self,
        directory: Path,
        stored: Mapping[str, StoredTensor],
        storage: Storage | None,
        placement: Placement,
    ) -> None:
        super().__init__(directory, stored, storage, placement)
        self.names: set[str] = set()
        self.nbytes = 0

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor. Nothing is dequantized or rounded: without data that would take longer."""
        self.parts(name, *shape)
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        """An empty tensor."""
        return Dense(self.take(name, outputs, inputs))

    def read(self, tensor: StoredTensor) -> Tensor:
        """An empty tensor of the right shape and dtype."""
        self.names.add(tensor.name)
        self.nbytes += tensor.nbytes
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")


class _Reader(StoredSource):
    """Reads tensors from memory-mapped files, one at a time."""

    def attach(self, advance: Callable[[int], object]) -> None:
        """Calls `advance` with the bytes read."""
        self._advance = advance
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor's data; on the CPU in the mapped memory of the file."""
        try:
            mapped = self._map(tensor.file)
        except OSError as error:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} cannot be read ({error}); copy the file again"
            ) from error
        self._advance(tensor.nbytes)
        if tensor.nbytes == 0:
            return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=self.device)
        value = torch.frombuffer(mapped, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)
        return value.view(DTYPES[tensor.dtype]).view(tensor.shape).to(self.device)

    def _map(self, file: Path) -> mmap.mmap:
        """Maps the file, and releases its pages from the memory of this process.

        Pages are rarely read again; the kernel then loads them again. The mapping is private because torch
        warns about read-only memory; nothing writes to it.
        """
        if file not in self._maps:
            with open_file(file) as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        for each in self._maps.values():
            each.madvise(mmap.MADV_DONTNEED)
        return self._maps[file]


def _log_unused(config: ModelConfig, names: set[str]) -> None:
    """Logs unused tensors: multi-token prediction layers by name, all others as a warning."""
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
