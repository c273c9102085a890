"""Memory of a model's weights by kind, what the C library does with freed memory, and its lack."""

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from moe_worker.quant.matrix import DENSE, POSITIONS, SCALES, VALUES, Matrix

# Freed bytes at the end of the heap that stay in the process between steps.
KEPT_BYTES = 256 << 20
# Parameters of mallopt(3), and the largest threshold for mmap that glibc accepts.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_THRESHOLD = -1, -3, 32 << 20
# In what torch raises where the CPU has no memory.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextlib.contextmanager
def lack_of_memory() -> Iterator[None]:
    """Raises torch.OutOfMemoryError also where the CPU's memory is used up: torch raises RuntimeError then,
    and the CPU kernels MemoryError.
    """
    try:
        yield
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error
    except RuntimeError as error:
        if _CPU_ALLOCATOR not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def weight_memory(part: object) -> dict[str, int]:
    """Bytes of all tensors in `part` (a model, or anything made of dataclasses and sequences).

    Values are those of packed matrices; zero points count as scales; everything else is the dense rest.
    """
    found: Counter[str] = Counter()
    _count(part, found)
    return {kind: found[kind] for kind in (VALUES, POSITIONS, SCALES, DENSE)}


def give_back_freed() -> None:
    """Returns freed memory to the system if the C library can; it keeps holes between live blocks otherwise.

    Called after each layer while a model loads, because a layer is built from many small matrices.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed() -> None:
    """Lets the C library keep up to KEPT_BYTES of freed memory for the next step, if it can.

    By default glibc may return the temporary tensors of a prompt to the system after each step, depending on
    the sizes that were freed before, and the next step takes a page fault for every 4 KiB. Steps do not need
    more memory at their peak: the process stays at the size that its largest step had.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        set_option(_M_TRIM_THRESHOLD, KEPT_BYTES)


def describe(memory: dict[str, int]) -> str:
    """One clause: each kind present and the sum, in megabytes."""
    kinds = [f"{nbytes / 1e6:.2f} MB {kind}" for kind, nbytes in memory.items() if nbytes]
    return f"{', '.join(kinds)}; {sum(memory.values()) / 1e6:.2f} MB in all"


def _count(part: object, found: Counter[str]) -> None:
    if isinstance(part, Tensor):
        found[DENSE] += part.nbytes
    elif isinstance(part, Matrix):
        for tensor, kind, *_ in part.parts:
            found[kind] += tensor.nbytes
    elif isinstance(part, tuple | list):
        for item in part:
            _count(item, found)
    elif is_dataclass(part):
        for field in fields(part):
            _count(getattr(part, field.name), found)
