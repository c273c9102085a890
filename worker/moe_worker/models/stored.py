"""Converts the tensors of a checkpoint from their stored format to the format of the model.

Legend: O outputs, I inputs, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_worker.config.quantization import Storage
from moe_worker.errors import CheckpointError
from moe_worker.models.safetensors import StoredTensor
from moe_worker.models.stored_layouts import layout_of
from moe_worker.quant import compressed_tensors
from moe_worker.quant.formats import FORMATS
from moe_worker.quant.matrix import Dense, Matrix
from moe_worker.quant.pieces import GPU_PIECE

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


@dataclass(frozen=True)
class Placement:
    """Device, dtype and format of a model in memory.

    format: of projections: "dense", "w4a16", "w4a8" or "fp8" (see config/engine.py). Matrices stored in that
    format are used unchanged; if none are, all are rounded when they load. check_weights: every stored value
    must be finite.
    """

    dtype: torch.dtype
    device: torch.device
    format: str = "dense"
    check_weights: bool = True


class StoredSource:
    """A TensorSource for tensors in safetensors files; subclasses read them, or only check them."""

    def __init__(
        self,
        directory: Path,
        stored: Mapping[str, StoredTensor],
        storage: Storage | None,
        placement: Placement,
    ) -> None:
        self.dtype, self.device = placement.dtype, placement.device
        self._format = FORMATS[placement.format]
        self.round_tokens = self._format.int8
        self._check_weights = placement.check_weights
        self._directory, self._stored, self._storage = directory, stored, storage
        self._layout = layout_of(storage)

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor in its own dtype, on the source's device."""
        raise NotImplementedError

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Tensor `name`, which must have `shape`, in `dtype` (None: the source's own). CheckpointError."""
        return self.stored(name, *shape).dequantize(dtype or self.dtype)

    def matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        """The weights of a projection in the model's format. Raises CheckpointError."""
        stored, form = self.stored(name, outputs, inputs), self._format
        if form.bits is not None and type(stored) in form.matrices:
            return stored.map(Tensor.clone)  # what was mapped from a file must not outlive it
        if form.bits is None or isinstance(self._storage, form.own):
            # A plain matrix next to packed ones: who quantized the others left this one on purpose.
            return Dense(stored.dequantize(self.dtype))
        plain = stored.dequantize(torch.float32) if stored.dense is None else stored.dense
        return form.quantize(plain, form.group(self._storage, inputs))

    def stored(self, name: str, *shape: int) -> Matrix:
        """Tensor `name` as it is stored, perhaps in mapped memory. Raises CheckpointError."""
        return self._layout.of(name, self._stored).matrix(self.parts(name, *shape), shape)

    def parts(self, name: str, *shape: int) -> dict[str, Tensor]:
        """The tensors of matrix `name` by the suffixes of their names, checked against the files' headers.

        Raises CheckpointError.
        """
        wanted = self._layout.of(name, self._stored).wanted(name, shape)
        if isinstance(wanted, str):
            raise CheckpointError(f"{self._directory}: {name} {wanted}; the files do not belong together")
        parts = {key: self._part(*part) for key, part in wanted.items()}
        self._check_shape(name, parts.get(compressed_tensors.SHAPE), shape)
        return parts

    def _check_shape(self, name: str, told: Tensor | None, shape: tuple[int, ...]) -> None:
        """`told`: the shape that a packed checkpoint stores with the weights."""
        if told is None or told.is_meta or told.tolist() == list(shape):
            return
        stored = self._stored[name.removesuffix("weight") + compressed_tensors.SHAPE]
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} says {told.tolist()}, but config.json needs "
            f"{list(shape)}; the files do not belong together"
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
    """Whether all elements are finite, in one pass at about the speed of a copy.

    A sum is not finite if an element is not. If only the sum overflows, each element is checked.
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
    """Number of elements that are not finite; copies a few elements at a time."""
    return sum(int((~part.float().isfinite()).sum()) for part in value.flatten().split(GPU_PIECE))


def _not_finite(tensor: StoredTensor, value: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name} holds {_count_wrong(value)} values that are not finite "
        "numbers; copy the file again, or train or convert the model again"
    )


def _mismatch(tensor: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> str | None:
    """The problem with a tensor and the expected value; None if it can be used."""
    if tensor.shape != shape:
        return f"has shape {list(tensor.shape)}, but config.json needs {list(shape)}"
    if tensor.dtype not in dtypes:
        return f"is stored as {tensor.dtype}; it must be one of {', '.join(dtypes)}"
    needed = DTYPES[tensor.dtype].itemsize * torch.Size(shape).numel()
    if tensor.nbytes != needed:
        return f"takes {tensor.nbytes} bytes in the file, but its shape needs {needed}; copy the file again"
    return None
