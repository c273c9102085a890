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
from moe_worker.quant.int4 import GROUP, Int4Weight, quantize_int4
from moe_worker.quant.matrix import Matrix
from moe_worker.quant.pieces import GPU_PIECE
from moe_worker.quant.sparse14 import Sparse14Weight

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
FLOATING = ("F32", "F16", "BF16")
# Scales of FP8 blocks: as DeepSeek, as Qwen, and as powers of two.
SCALES = (*FLOATING, "F8_E8M0")
PLAIN, FP8_SCALE = "", "_scale_inv"


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
    check_weights: bool = True


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
        stored, dtype = self.stored(name, *shape), dtype or self.dtype
        if isinstance(stored, Tensor):
            return stored.to(dtype=dtype, copy=True)  # what was mapped from a file must not outlive it
        return stored.dequantize(dtype)

    def matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        """The weights of a projection in the model's format. Raises CheckpointError."""
        if self._format == "dense":
            return self.take(name, outputs, inputs)
        stored, is_fp8 = self.stored(name, outputs, inputs), isinstance(self._storage, Fp8Storage)
        if self._format == "fp8" and isinstance(stored, Fp8Weight):
            return stored.map(Tensor.clone)
        if self._format != "fp8" and isinstance(stored, Int4Weight | Sparse14Weight):
            return stored
        if self._storage is not None and self._format == ("fp8" if is_fp8 else "w4a16"):
            return self.take(name, outputs, inputs)  # who quantized the others left this one on purpose
        plain = stored if isinstance(stored, Tensor) else stored.dequantize(torch.float32)
        return quantize_fp8(plain) if self._format == "fp8" else quantize_int4(plain, self._group(inputs))

    def _group(self, inputs: int) -> int:
        """Of int4 weights that are rounded here: that of those which the checkpoint has in four bits."""
        if isinstance(self._storage, PackedStorage | SparseStorage):
            return self._storage.group or inputs
        return GROUP

    def stored(self, name: str, *shape: int) -> Matrix:
        """Tensor `name` as the files have it, perhaps in a file's memory. Raises CheckpointError."""
        kind, parts = self._kind(name), self.parts(name, *shape)
        if isinstance(kind, SparseStorage):
            return sparse14.from_tensors(parts, shape[1], kind.group)
        if isinstance(kind, PackedStorage):
            return layout.from_tensors(parts, shape[1], kind.group or shape[1])
        if isinstance(kind, Fp8Storage):
            return from_blocks(parts[PLAIN], parts[FP8_SCALE], kind.block)
        return parts[PLAIN]

    def parts(self, name: str, *shape: int) -> dict[str, Tensor]:
        """The tensors that make up `name`, checked against the files' headers, by the ends of their names.

        Raises CheckpointError.
        """
        kind = self._kind(name)
        if isinstance(kind, SparseStorage):
            return self._sparse_parts(kind, name, *shape)
        if isinstance(kind, PackedStorage):
            return self._packed_parts(kind, name, *shape)
        if isinstance(kind, Fp8Storage):
            scales = tuple(-(-size // edge) for size, edge in zip(shape, kind.block, strict=True))
            return {
                PLAIN: self._part(name, shape, ("F8_E4M3",)),
                FP8_SCALE: self._part(name + FP8_SCALE, scales, SCALES),
            }
        return {PLAIN: self._part(name, shape, FLOATING)}

    def _kind(self, name: str) -> Storage | None:
        """How this tensor is stored: some are left plain in every kind of checkpoint."""
        storage, stem = self._storage, name.removesuffix("weight")
        if isinstance(storage, Fp8Storage):
            return storage if name + FP8_SCALE in self._stored else None
        if isinstance(storage, SparseStorage) and stem + sparse14.VALUES in self._stored:
            return storage
        if storage is None or stem + layout.PACKED not in self._stored:
            return None
        return PackedStorage(storage.group, symmetric=isinstance(storage, SparseStorage) or storage.symmetric)

    def _packed_parts(self, kind: PackedStorage, name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
        stem, groups = name.removesuffix("weight"), -(-inputs // (kind.group or inputs))
        words = -(-inputs // layout.VALUES_A_WORD)
        parts = {
            layout.PACKED: self._part(stem + layout.PACKED, (outputs, words), ("I32",)),
            layout.SCALE: self._part(stem + layout.SCALE, (outputs, groups), FLOATING),
        }
        self._check_shape(stem + layout.SHAPE, outputs, inputs)
        if not kind.symmetric:
            zero_words = -(-outputs // layout.VALUES_A_WORD)
            parts[layout.ZERO] = self._part(stem + layout.ZERO, (zero_words, groups), ("I32",))
        return parts

    def _sparse_parts(self, kind: SparseStorage, name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
        if inputs % sparse14.QUAD:
            raise CheckpointError(
                f"{self._directory}: {name} is stored 1:4 sparse, but config.json gives it {inputs} inputs, "
                "which is not a multiple of 4; the files do not belong together"
            )
        stem = name.removesuffix("weight")
        return {
            part: self._part(stem + part, shape, FLOATING if part == sparse14.SCALE else ("U8",))
            for part, shape in sparse14.shapes(outputs, inputs, kind.group).items()
        }

    def _check_shape(self, name: str, outputs: int, inputs: int) -> None:
        shape = self._part(name, (2,), ("I64", "I32"))
        if not shape.is_meta and shape.tolist() != [outputs, inputs]:
            raise CheckpointError(
                f"{self._stored[name].file}: tensor {name} says {shape.tolist()}, but config.json needs "
                f"{[outputs, inputs]}; the files do not belong together"
            )

    def _part(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
        """One stored tensor, checked against its header."""
        tensor = self._stored.get(name)
        if tensor is None:
            raise CheckpointError(f"{self._directory}: tensor {name} is missing; its shape is {list(shape)}")
        wrong = _mismatch(tensor, shape, dtypes)
        if wrong is not None:
            raise CheckpointError(f"{tensor.file}: tensor {name} {wrong}")
        value = self.read(tensor)
        checked = self._check_weights and value.is_floating_point() and not value.is_meta
        if checked and not has_only_numbers(value):
            raise _not_finite(tensor, value)
        return value


def has_only_numbers(value: Tensor) -> bool:
    """Whether no element is infinite or NaN, in one pass at about the speed of a copy.

    A sum is not finite if an element is not. If the sum only overflows, each element is checked.
    """
    if value.numel() == 0:
        return True
    if value.dtype == torch.float8_e4m3fn:  # its NaNs are 0x7f and 0xff
        bits = value.view(torch.uint8)
        return int(bits.amax()) != 0xFF and int(bits.view(torch.int8).amax()) != 0x7F
    if value.dtype == torch.float8_e8m0fnu:  # its NaN is 0xff
        return int(value.view(torch.uint8).amax()) != 0xFF
    return bool(value.sum().isfinite()) or not _count_wrong(value)


def _count_wrong(value: Tensor) -> int:
    """Elements that are not finite; a copy of few elements at a time."""
    return sum(int((~part.float().isfinite()).sum()) for part in value.flatten().split(GPU_PIECE))


def _not_finite(tensor: StoredTensor, value: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name} holds {_count_wrong(value)} values that are not finite "
        "numbers; copy the file again, or train or convert the model again"
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
