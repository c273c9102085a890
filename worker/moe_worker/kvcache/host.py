"""More CPU memory for pages of a cache that is in CPU memory itself: copies, at once, and checksums.

kvcache/pinned.py does the same for GPUs, while steps run.

Legend: L layers, R rows of the cache, N bytes of a row, S tokens of a page.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from moe_worker.errors import SettingsError
from moe_worker.kvcache.offload import Move
from moe_worker.kvcache.paged import PagedCache

WORD = 8
_TRIALS = 8
_SUMS_S = 0.005
"""Checksums of saved pages take so long in one step at most; other pages wait for the next one."""


class HostPages:
    """As many slots as fit into `memory` bytes: an `offload.Storage`.

    Attributes:
        slots: their number.
        page_s: seconds that a page takes to come back, with its checksum; the shortest of some trials.
        sums_most: checksums of saved pages in one step.

    Raises SettingsError if not one page fits, or the machine has not so much memory.
    """

    def __init__(self, cache: PagedCache, memory: int) -> None:
        self._rows_LRN = cache.storage_LRN
        self._size = cache.page_size
        layers, _, width = self._rows_LRN.shape
        self._shape = (layers, self._size, width)
        nbytes = layers * self._size * width
        padded = whole_words(nbytes)
        (self.slots,) = slots_in(memory, nbytes, pinned=False)
        self._slots = allocate(self.slots, padded, pinned=False).unbind()
        self._nbytes = nbytes
        self._sums: dict[int, tuple[int, int]] = {}
        self._arrived: dict[int, None] = {}
        """Slots whose checksum is missing, in order."""
        self.sums_most = max(1, int(_SUMS_S / self._shortest(lambda: self._sum(0))))
        self.page_s = self._shortest(lambda: self._back(cache.pages))

    @torch.inference_mode()
    def run(self, moves: Sequence[Move]) -> None:
        """Copies pages, in order; computes some checksums of those that were saved."""
        for slot, page, saves in moves:
            if saves:
                self._slot(slot).copy_(self._page(page))
                self._sums.pop(slot, None)
                self._arrived.pop(slot, None)
                self._arrived[slot] = None
            else:
                self._page(page).copy_(self._slot(slot))
        for slot in list(islice(self._arrived, self.sums_most)):
            del self._arrived[slot]
            self._sums[slot] = self._sum(slot)

    def fetch(self, slots: Iterable[int]) -> None:
        """Does nothing: pages come back at once."""

    def forget(self, slot: int) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing."""

    def ready(self, slot: int) -> bool:
        """Whether the last page that was copied to the slot has its checksum, as of the last `run`."""
        return slot in self._sums

    def intact(self, slot: int) -> bool:
        """Whether the slot holds what arrived."""
        return self._sums.get(slot) == self._sum(slot)

    def _sum(self, slot: int) -> tuple[int, int]:
        """A change of any bit changes both; some 10 GB/s."""
        words = self._slots[slot].numpy().view(np.uint64)
        return int(np.bitwise_xor.reduce(words)), int(np.add.reduce(words))

    def _slot(self, slot: int) -> Tensor:
        return self._slots[slot][: self._nbytes].view(self._shape)

    def _page(self, page: int) -> Tensor:
        return self._rows_LRN[:, page * self._size : (page + 1) * self._size]

    def _back(self, page: int) -> None:
        """A page comes back, with its checksum."""
        self.run([Move(0, page, saves=False)])
        self._sum(0)

    def _shortest(self, work: Callable[[], object]) -> float:
        """Seconds."""
        times = []
        for _ in range(_TRIALS):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)


def allocate(slots: int, nbytes: int, pinned: bool) -> Tensor:
    """[slots, nbytes], zeros. Raises SettingsError."""
    try:
        if pinned:
            return torch.zeros(slots, nbytes, dtype=torch.uint8, pin_memory=True)
        # numpy maps zero pages, which the kernel provides on first touch.
        return torch.from_numpy(np.zeros((slots, nbytes), np.uint8))
    except (RuntimeError, MemoryError) as error:
        raise SettingsError(
            f"KV offload of {slots * nbytes} bytes cannot be allocated in CPU memory; give less"
        ) from error


def whole_words(nbytes: int) -> int:
    """Bytes of the slot of a page."""
    return -(-nbytes // WORD) * WORD


def slots_in(memory: int, page: int, pinned: bool) -> list[int]:
    """Slots of each allocation for pages of `page` bytes. Raises SettingsError if not one fits."""
    each = whole_words(page)
    counts = pinned_slots(memory, each) if pinned else [memory // each]
    if not any(counts):
        raise SettingsError(
            f"KV offload memory of {memory} bytes is too small: one page takes {each}; give more, or 0"
        )
    return counts


def check_memory(memory: int, page: int, pinned: bool) -> None:
    """Raises SettingsError if pages of `page` bytes cannot be kept; for use before there is a cache.

    Mapping memory takes no time, and fails where the machine does not have it.
    """
    slots_in(memory, page, pinned)
    allocate(1, memory, pinned=False)


def pinned_slots(memory: int, nbytes: int) -> list[int]:
    """Slots of `nbytes` bytes of each allocation, so that all together take `memory` bytes at most.

    torch rounds each allocation of pinned memory up to a power of two.
    """
    counts = []
    while memory >= nbytes:
        part = 1 << memory.bit_length() - 1
        counts += [part // nbytes] if part >= nbytes else []
        memory -= part
    return counts
