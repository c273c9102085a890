"""Tensors of a checkpoint as the model wants them, however they are stored.

Legend: O outputs, I inputs, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_worker.config.quantization import Fp8Storage, PackedStorage, SparseStorage, Storage
from moe_worker.errors import CheckpointError
from moe_worker.models.safetensors import StoredTensor
from moe_worker.quant import compressed_tensors as layout
from moe_worker.quant import sparse14
from moe_worker.quant.fp8 import Fp8Weight, from_blocks, quantize_fp8
from moe_worker.quant.int4 import Int4Weight, quantize_int4
from moe_worker.quant.matrix import Matrix
from moe_worker.quant.sparse14 import Sparse14Weight

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
FLOATING = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Placement:
    """How a model is held.

    format: of projections, "dense", "w4a16", "w4a8" or "fp8" (config/engine.py says what they are): those
    stored so are taken as they are; all are rounded at load where none is. check_weights: every stored value
    must be finite.
    """

    dtype: torch.dtype
    device: torch.device
    format: str = "dense"
    check_weights: bool = False


class StoredSource:
    """A TensorSource over the tensors in the files' headers; a subclass reads, or only checks."""

    def __init__(
        self,
        directory: Path,
        stored: Mapping[str, StoredTensor],
        storage: Storage | None,
        placement: Placement,
    ) -> None:
        self.dtype, self.device = placement.dtype, placement.device
        self.round_tokens, self._format = placement.format == "w4a8", placement.format
        self._check_weights = placement.check_weights
        self._directory, self._stored, self._storage = directory, stored, storage

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor in its own dtype, on the source's device."""
        raise NotImplementedError

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Tensor `name`, which must have `shape`, in `dtype` (None: the source's own). CheckpointError."""
        dtype = dtype or self.dtype
        if self._is_sparse(name):
            return self._read_sparse(name, *shape).dequantize(dtype)
        if self._is_packed(name):
            return self._read_packed(name, *shape).dequantize(dtype)
        if self._is_fp8(name):
            return self._read_fp8(name, *shape).dequantize(dtype)
        # copy: what was mapped from a file must not outlive it.
        return self._part(name, shape, FLOATING).to(dtype=dtype, copy=True)

    def matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        """The weights of a projection in the model's format. Raises CheckpointError."""
        if self._format == "dense":
            return self.take(name, outputs, inputs)
        if self._format == "fp8":
            return self._fp8_matrix(name, outputs, inputs)
        if self._is_sparse(name):
            return self._read_sparse(name, outputs, inputs)
        if self._is_packed(name):
            return self._read_packed(name, outputs, inputs)
        if isinstance(self._storage, PackedStorage | SparseStorage):
            return self.take(name, outputs, inputs)  # who quantized the others left this one on purpose
        return quantize_int4(self._unrounded(name, outputs, inputs))

    def _fp8_matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        if self._is_fp8(name):
            return self._read_fp8(name, outputs, inputs).map(Tensor.clone)
        if isinstance(self._storage, Fp8Storage):
            return self.take(name, outputs, inputs)  # as above
        return quantize_fp8(self._unrounded(name, outputs, inputs))

    def _unrounded(self, name: str, *shape: int) -> Tensor:
        """A tensor to be rounded: plain ones as they are stored, perhaps in a file's memory."""
        if self._is_sparse(name) or self._is_packed(name) or self._is_fp8(name):
            return self.take(name, *shape, dtype=torch.float32)
        return self._part(name, shape, FLOATING)

    def _is_packed(self, name: str) -> bool:
        packed = isinstance(self._storage, PackedStorage | SparseStorage)
        return packed and f"{name}_packed" in self._stored

    def _is_sparse(self, name: str) -> bool:
        stem = name.removesuffix("weight")
        return isinstance(self._storage, SparseStorage) and stem + sparse14.VALUES in self._stored

    def _is_fp8(self, name: str) -> bool:
        return isinstance(self._storage, Fp8Storage) and f"{name}_scale_inv" in self._stored

    def _read_packed(self, name: str, outputs: int, inputs: int) -> Int4Weight:
        if not isinstance(self._storage, PackedStorage | SparseStorage):
            raise CheckpointError(f"{self._directory}: config.json says nothing of packed weights")
        stem = name.removesuffix("weight")
        group = self._storage.group or inputs
        groups = -(-inputs // group)
        words = -(-inputs // layout.VALUES_A_WORD)
        parts = {
            layout.PACKED: self._part(stem + layout.PACKED, (outputs, words), ("I32",)),
            layout.SCALE: self._part(stem + layout.SCALE, (outputs, groups), FLOATING),
        }
        self._check_shape(stem + layout.SHAPE, outputs, inputs)
        if isinstance(self._storage, PackedStorage) and not self._storage.symmetric:
            zero_words = -(-outputs // layout.VALUES_A_WORD)
            parts[layout.ZERO] = self._part(stem + layout.ZERO, (zero_words, groups), ("I32",))
        return layout.from_tensors(parts, inputs, group)

    def _read_sparse(self, name: str, outputs: int, inputs: int) -> Sparse14Weight:
        if not isinstance(self._storage, SparseStorage):
            raise CheckpointError(f"{self._directory}: config.json says nothing of sparse weights")
        if inputs % sparse14.QUAD:
            raise CheckpointError(
                f"{self._directory}: {name} is stored 1:4 sparse, but config.json gives it {inputs} inputs, "
                "which is no multiple of 4; the files do not belong together"
            )
        stem, group = name.removesuffix("weight"), self._storage.group
        shapes = sparse14.shapes(outputs, inputs, group)
        parts = {
            part: self._part(stem + part, shape, FLOATING if part == sparse14.SCALE else ("U8",))
            for part, shape in shapes.items()
        }
        return sparse14.from_tensors(parts, inputs, group)

    def _check_shape(self, name: str, outputs: int, inputs: int) -> None:
        shape = self._part(name, (2,), ("I64", "I32"))
        if not shape.is_meta and shape.tolist() != [outputs, inputs]:
            raise CheckpointError(
                f"{self._stored[name].file}: tensor {name} says {shape.tolist()}, but config.json needs "
                f"{[outputs, inputs]}; the files do not belong together"
            )

    def _read_fp8(self, name: str, *shape: int) -> Fp8Weight:
        """Over the tensor's own memory, which may be a file's."""
        if not isinstance(self._storage, Fp8Storage):
            raise CheckpointError(f"{self._directory}: config.json says nothing of FP8 weights")
        block = self._storage.block
        scales = tuple(-(-size // edge) for size, edge in zip(shape, block, strict=True))
        weight_OI = self._part(name, shape, ("F8_E4M3",))
        return from_blocks(weight_OI, self._part(f"{name}_scale_inv", scales, ("F32",)), block)

    def _part(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
        """One stored tensor, checked against its header."""
        tensor = self._stored.get(name)
        if tensor is None:
            raise CheckpointError(f"{self._directory}: tensor {name} is missing; its shape is {list(shape)}")
        wrong = _mismatch(tensor, shape, dtypes)
        if wrong is not None:
            raise CheckpointError(f"{tensor.file}: tensor {name} {wrong}")
        value = self.read(tensor)
        if self._check_weights and value.is_floating_point() and not value.is_meta:
            _check_finite(tensor, value)
        return value


def _check_finite(tensor: StoredTensor, value: Tensor) -> None:
    wrong = int((~value.float().isfinite()).sum())
    if wrong:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} holds {wrong} values that are not finite numbers; copy the "
            "file again, or train or convert the model again"
        )


def _mismatch(tensor: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> str | None:
    """What is wrong with a tensor, and what would be right; None if it can be used."""
    if tensor.shape != shape:
        return f"has shape {list(tensor.shape)}, but config.json needs {list(shape)}"
    if tensor.dtype not in dtypes:
        return f"is stored as {tensor.dtype}; it must be one of {', '.join(dtypes)}"
    needed = DTYPES[tensor.dtype].itemsize * torch.Size(shape).numel()
    if tensor.nbytes != needed:
        return f"takes {tensor.nbytes} bytes in the file, but its shape needs {needed}; copy the file again"
    return None
