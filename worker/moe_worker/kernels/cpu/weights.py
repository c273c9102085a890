"""Weights in the layout of the CPU kernels, which native/layout.h defines.

Legend: O outputs, I inputs, A stacked matrices (experts or heads), G groups, H heads.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from mmap import MAP_PRIVATE, mmap
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.errors import SettingsError
from moe_worker.kernels.cpu import structs
from moe_worker.kernels.cpu.library import load
from moe_worker.quant.int4 import Int4Weight
from moe_worker.quant.int8 import piece_of, quantize_columns
from moe_worker.quant.matrix import Matrix
from moe_worker.quant.sparse14 import Sparse14Weight

INT4, SPARSE14 = 4, 14  # `bits` in native/interface.h
GROUPS, SPARSE_GROUPS = 8, 64
"""Groups of inputs have a multiple of so many; those of 1:4 sparse weights of the second."""
_BLOCK = 16
_ALIGNMENT = 64
_HUGE_PAGE = 1 << 21
_SHARED = 4  # huge pages
_MADV_HUGEPAGE = 14  # the module mmap has it on Linux only


@dataclass(frozen=True)
class PackedWeight:
    """One matrix or a stack of them; `struct` points into the tensors, which must outlive it.

    group: inputs that share a scale. piece: inputs that share the scale of an int8 activation.
    """

    data: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    count: int
    outputs: int
    inputs: int
    group: int
    piece: int
    bits: int
    paired: bool

    @property
    def segment(self) -> int:
        """Inputs of one integer sum: those between two edges of groups or pieces."""
        return math.gcd(self.group, self.piece)

    @property
    def struct(self) -> structs.Weight:
        """The weight as the kernels read it."""
        zeros = self.zeros.data_ptr() if self.zeros is not None else None
        bias = self.bias.data_ptr() if self.bias is not None else None
        return structs.Weight(
            self.data.data_ptr(),
            zeros,
            bias,
            self.outputs,
            self.inputs,
            self.group,
            self.piece,
            self.segment,
            self.bits,
            int(self.paired),
        )


@dataclass(frozen=True)
class HeadWeight:
    """An int8 matrix for each head; `struct` points into `data`, which must outlive it."""

    data: Tensor
    outputs: int
    inputs: int

    @property
    def struct(self) -> structs.HeadWeightStruct:
        """The weights as the kernels read them."""
        return structs.HeadWeightStruct(self.data.data_ptr(), self.outputs, self.inputs)


def pack_heads(weight_HOI: Tensor) -> HeadWeight:
    """Packs a matrix for each head, rounded as `quantize_columns` does: 16 rows and 4 inputs lie together,
    behind the scales of the rows.
    """
    outputs, inputs = weight_HOI.shape[1:]
    values_HOI, scales_HO1 = quantize_columns(weight_HOI, 2)
    more = -outputs % _BLOCK
    values = functional.pad(values_HOI, (0, -inputs % 4, 0, more)).unflatten(2, (-1, 4))
    steps = values.unflatten(1, (-1, _BLOCK)).transpose(2, 3).flatten(2)
    scales = functional.pad(scales_HO1, (0, 0, 0, more)).view(len(steps), -1, _BLOCK)
    blocks = torch.cat((scales.contiguous().view(torch.int8), steps), dim=2)
    data = aligned_bytes(blocks.nbytes + _ALIGNMENT)
    data[: blocks.nbytes].view(torch.int8).copy_(blocks.flatten())
    return HeadWeight(data, outputs, inputs)


def pack_int4(
    weight: Int4Weight,
    bias_O: Tensor | None = None,
    paired: bool = False,
    piece: int | None = None,
    rest: Callable[[], object] = lambda: None,
) -> PackedWeight:
    """Packs [O, I] or a stack [A, O, I]; `paired` for gate and up, the halves of O.

    piece: inputs that share the scale of an activation; None: the default of quant.int8 for I. rest: called
    after each matrix of the stack.

    Raises SettingsError if the group is no multiple of 8.
    """
    if weight.group % GROUPS:
        raise SettingsError(
            f"the CPU kernels take groups of multiples of {GROUPS} inputs, not of {weight.group}"
        )
    zeros = None if weight.zeros_OG is None else (weight.zeros_OG + 8).to(torch.uint8)
    layout = (weight.inputs, weight.group, piece or piece_of(weight.inputs))
    return _pack(weight.packed_OP, weight.scales_OG, zeros, bias_O, layout, paired, rest)


def pack_sparse14(
    weight: Sparse14Weight,
    bias_O: Tensor | None = None,
    paired: bool = False,
    piece: int | None = None,
    rest: Callable[[], object] = lambda: None,
) -> PackedWeight:
    """Packs [O, I] or a stack [A, O, I] of 1:4 sparse weights; `paired`, `piece`, `rest` as in `pack_int4`.

    Raises SettingsError if the group is no multiple of 64.
    """
    if weight.group % SPARSE_GROUPS:
        raise SettingsError(
            f"the CPU kernels for s14 take groups of multiples of {SPARSE_GROUPS} inputs, "
            f"not of {weight.group}"
        )
    stacked = weight if weight.values_OP.dim() == 3 else weight.map(lambda tensor: tensor.unsqueeze(0))
    outputs, inputs, group = weight.outputs, weight.inputs, weight.group
    size = load().moe_packed_bytes(outputs, inputs, group, SPARSE14, int(paired))
    data = aligned_bytes(stacked.count * size + _ALIGNMENT)
    for index in range(stacked.count):
        one = stacked[index].map(Tensor.contiguous)
        scales_OG = one.scales_OG.float().contiguous()
        load().moe_pack_sparse14(
            one.values_OP.data_ptr(),
            one.positions_OR.data_ptr(),
            scales_OG.data_ptr(),
            data.data_ptr() + index * size,
            outputs,
            inputs,
            group,
            int(paired),
        )
        rest()
    bias = bias_O.float().contiguous() if bias_O is not None else None
    piece = piece or piece_of(inputs)
    return PackedWeight(data, None, bias, stacked.count, outputs, inputs, group, piece, SPARSE14, paired)


def _pack(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias_O: Tensor | None,
    layout: tuple[int, int, int],
    paired: bool,
    rest: Callable[[], object],
) -> PackedWeight:
    inputs, group, piece = layout
    stacked = values if values.dim() == 3 else values.unsqueeze(0)
    count, outputs = stacked.shape[:2]
    size = load().moe_packed_bytes(outputs, inputs, group, INT4, int(paired))
    blocks = 2 * -(-outputs // 2 // _BLOCK) if paired else -(-outputs // _BLOCK)
    zeros_size = blocks * _BLOCK * -(-inputs // group)
    data = aligned_bytes(count * size + _ALIGNMENT)
    zeros_out = aligned_bytes(count * zeros_size + _ALIGNMENT) if zeros is not None else None
    for index in range(count):
        one = stacked[index].contiguous()
        scale = scales.reshape(count, outputs, -1)[index].float().contiguous()
        zero = zeros.reshape(count, outputs, -1)[index].contiguous() if zeros is not None else None
        load().moe_pack(
            one.data_ptr(),
            scale.data_ptr(),
            zero.data_ptr() if zero is not None else None,
            data.data_ptr() + index * size,
            zeros_out.data_ptr() + index * zeros_size if zeros_out is not None else None,
            outputs,
            inputs,
            group,
            int(paired),
        )
        rest()
    bias = bias_O.float().contiguous() if bias_O is not None else None
    return PackedWeight(data, zeros_out, bias, count, outputs, inputs, group, piece, INT4, paired)


_PACKERS: dict[type[Matrix], Callable[..., PackedWeight]] = {
    Int4Weight: pack_int4,
    Sparse14Weight: pack_sparse14,
}


def pack(
    matrix: Matrix,
    bias_O: Tensor | None = None,
    paired: bool = False,
    piece: int | None = None,
    rest: Callable[[], object] = lambda: None,
) -> PackedWeight:
    """Packs a matrix of any format that has kernels: see `pack_int4`. Raises SettingsError for others."""
    packer = _PACKERS.get(type(matrix))
    if packer is None:
        raise SettingsError(f"there are no CPU kernels for weights of type {type(matrix).__name__}")
    return packer(matrix, bias_O, paired, piece, rest)


class _SmallParts:
    """Memory for weights smaller than a huge page, which share several: they live as long as any of them.

    In one page alone, each of 1 to 2 MB would leave the rest of it unused.
    """

    def __init__(self) -> None:
        self._lock, self._rest = Lock(), torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        whole = size + -size % _ALIGNMENT
        with self._lock:
            if whole > len(self._rest):
                self._rest = _huge_pages(_SHARED * _HUGE_PAGE)
            part, self._rest = self._rest[:size], self._rest[whole:]
        return part


_small_parts = _SmallParts()


def aligned_bytes(size: int) -> Tensor:
    """Aligned uint8 storage in huge pages, without which a decode step has 30,000 TLB misses more."""
    return _huge_pages(size) if size >= _HUGE_PAGE else _small_parts.take(size)


def _huge_pages(size: int) -> Tensor:
    # Not from malloc: memory that it reuses keeps its small pages.
    area = mmap(-1, size + _HUGE_PAGE, MAP_PRIVATE)
    with suppress(OSError):  # a kernel without huge pages, which only save time
        area.madvise(_MADV_HUGEPAGE)
    with torch.inference_mode(mode=False):  # small weights share it, whoever packs them
        room = torch.frombuffer(area, dtype=torch.uint8)
    start = -room.data_ptr() % _HUGE_PAGE
    return room[start : start + size]
