"""How a checkpoint stores a matrix: the tensors that it consists of, and their conversion.

docs/formats.md describes each layout. Each has a class; `layout_of` selects it by config.json.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe_worker.config.quantization import Fp8Storage, PackedStorage, SparseStorage, Storage
from moe_worker.quant import compressed_tensors, sparse14
from moe_worker.quant.fp8 import from_blocks
from moe_worker.quant.matrix import Dense, Matrix

FLOATING = ("F32", "F16", "BF16")
# Scales of FP8 blocks: as DeepSeek, as Qwen, and as powers of two.
SCALES = (*FLOATING, "F8_E8M0")
PLAIN, FP8_SCALE = "", "_scale_inv"

Wanted = dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]]
"""By the ends of names: the name of a tensor, its shape, and the dtypes that it may have."""


class Layout(Protocol):
    """One way of storing a matrix."""

    def of(self, name: str, stored: Container[str]) -> "Layout":
        """The layout of one matrix: every kind of checkpoint leaves some matrices plain."""
        ...

    def wanted(self, name: str, shape: tuple[int, ...]) -> Wanted | str:
        """The tensors of matrix `name`, or the reason why there can be none, as the end of a sentence."""
        ...

    def matrix(self, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Matrix:
        """The matrix made of these tensors, which may share their memory."""
        ...


@dataclass(frozen=True)
class PlainLayout:
    """Plain floating-point numbers."""

    def of(self, name: str, stored: Container[str]) -> Layout:
        """Always this."""
        del name, stored
        return self

    def wanted(self, name: str, shape: tuple[int, ...]) -> Wanted | str:
        """The tensor itself."""
        return {PLAIN: (name, shape, FLOATING)}

    def matrix(self, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Matrix:
        """The tensor itself."""
        del shape
        return Dense(parts[PLAIN])


@dataclass(frozen=True)
class Fp8Layout:
    """FP8 with a scale for each block."""

    storage: Fp8Storage

    def of(self, name: str, stored: Container[str]) -> Layout:
        """Plain without scales."""
        return self if name + FP8_SCALE in stored else PlainLayout()

    def wanted(self, name: str, shape: tuple[int, ...]) -> Wanted | str:
        """Values and scales."""
        blocks = tuple(-(-size // edge) for size, edge in zip(shape, self.storage.block, strict=True))
        return {
            PLAIN: (name, shape, ("F8_E4M3",)),
            FP8_SCALE: (name + FP8_SCALE, blocks, SCALES),
        }

    def matrix(self, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Matrix:
        """An Fp8Weight."""
        del shape
        return from_blocks(parts[PLAIN], parts[FP8_SCALE], self.storage.block)


@dataclass(frozen=True)
class PackedLayout:
    """compressed-tensors pack-quantized."""

    storage: PackedStorage

    def of(self, name: str, stored: Container[str]) -> Layout:
        """Plain without packed values."""
        packed = name.removesuffix("weight") + compressed_tensors.PACKED
        return self if packed in stored else PlainLayout()

    def wanted(self, name: str, shape: tuple[int, ...]) -> Wanted | str:
        """Values, scales, the shape and, where asymmetric, zero points."""
        outputs, inputs = shape
        stem, groups = name.removesuffix("weight"), -(-inputs // (self.storage.group or inputs))
        words = -(-inputs // compressed_tensors.VALUES_A_WORD)
        parts: Wanted = {
            compressed_tensors.PACKED: (stem + compressed_tensors.PACKED, (outputs, words), ("I32",)),
            compressed_tensors.SCALE: (stem + compressed_tensors.SCALE, (outputs, groups), FLOATING),
            compressed_tensors.SHAPE: (stem + compressed_tensors.SHAPE, (2,), ("I64", "I32")),
        }
        if not self.storage.symmetric:
            zeros = (-(-outputs // compressed_tensors.VALUES_A_WORD), groups)
            parts[compressed_tensors.ZERO] = (stem + compressed_tensors.ZERO, zeros, ("I32",))
        return parts

    def matrix(self, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Matrix:
        """An Int4Weight."""
        return compressed_tensors.from_tensors(parts, shape[1], self.storage.group or shape[1])


@dataclass(frozen=True)
class SparseLayout:
    """s14. A matrix that is not sparse may be stored as pack-quantized or plain."""

    storage: SparseStorage

    def of(self, name: str, stored: Container[str]) -> Layout:
        """As pack-quantized if there are no sparse values."""
        if name.removesuffix("weight") + sparse14.VALUES in stored:
            return self
        return PackedLayout(PackedStorage(self.storage.group, symmetric=True)).of(name, stored)

    def wanted(self, name: str, shape: tuple[int, ...]) -> Wanted | str:
        """Values, positions and scales."""
        outputs, inputs = shape
        if inputs % sparse14.QUAD:
            return (
                f"is stored 1:4 sparse, but config.json gives it {inputs} inputs, which is not a multiple of "
                f"{sparse14.QUAD}"
            )
        stem = name.removesuffix("weight")
        return {
            part: (stem + part, size, FLOATING if part == sparse14.SCALE else ("U8",))
            for part, size in sparse14.shapes(outputs, inputs, self.storage.group).items()
        }

    def matrix(self, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Matrix:
        """A Sparse14Weight."""
        return sparse14.from_tensors(parts, shape[1], self.storage.group)


def layout_of(storage: Storage | None) -> Layout:
    """The layout of a checkpoint's matrices; plain if config.json names none."""
    match storage:
        case Fp8Storage():
            return Fp8Layout(storage)
        case PackedStorage():
            return PackedLayout(storage)
        case SparseStorage():
            return SparseLayout(storage)
        case None:
            return PlainLayout()
