"""CPU memory for pages of the cache: copies, in stream order on a GPU, and checksums.

Copies run on the stream that computes steps. A page is saved before the next step can overwrite it, and is
back before the step that reads it, without further synchronization.

Legend: L layers, R rows of the cache, N bytes of a row, S tokens of a page.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from moe_worker.errors import SettingsError
from moe_worker.kvcache.offload import Move
from moe_worker.kvcache.paged import PagedCache

_WORD = 8
_TRIALS = 8
_SUMS_S = 0.005
"""Checksums of saved pages take so long in one step at most; other pages wait for the next one."""


class HostPages:
    """As many slots as fit into `memory` bytes: an `offload.Storage`.

    Attributes:
        slots: their number.
        page_s: seconds that a page takes to come back, with its checksum; the shortest of some trials.
        sums_most: checksums of saved pages in one step.

    Raises SettingsError if not one page fits, or the machine has not so much memory to pin.
    """

    def __init__(self, cache: PagedCache, memory: int) -> None:
        self._rows_LRN = cache.storage_LRN
        self._size = cache.page_size
        layers, _, width = self._rows_LRN.shape
        self._shape = (layers, self._size, width)
        nbytes = layers * self._size * width
        padded = -(-nbytes // _WORD) * _WORD
        self._cuda = cache.device.type == "cuda"
        counts = pinned_slots(memory, padded) if self._cuda else [memory // padded]
        self.slots = sum(counts)
        if not self.slots:
            raise SettingsError(
                f"KV offload memory of {memory} bytes is too small: one page takes {padded}; give more, or 0"
            )
        self._slots = [slot for count in counts for slot in _allocate(count, padded, self._cuda).unbind()]
        self._nbytes = nbytes
        self._sums: dict[int, tuple[int, int]] = {}
        self._newest: dict[int, int] = {}
        self._saves = 0
        self._pending: deque[tuple[torch.cuda.Event | None, list[tuple[int, int]]]] = deque()
        self._arrived: dict[int, None] = {}
        """Slots whose checksum is missing, in order."""
        self.sums_most = max(1, int(_SUMS_S / self._shortest(lambda: self._sum(0))))
        self.page_s = self._shortest(lambda: self._back(cache.pages))

    @torch.inference_mode()
    def run(self, moves: Sequence[Move]) -> None:
        """Starts the copies, in order; computes some checksums of those that have arrived."""
        saved = []
        for slot, page, saves in moves:
            if saves:
                self._slot(slot).copy_(self._page(page), non_blocking=True)
                self._saves += 1
                self._newest[slot] = self._saves
                self._sums.pop(slot, None)
                self._arrived.pop(slot, None)
                saved.append((slot, self._saves))
            else:
                self._page(page).copy_(self._slot(slot), non_blocking=True)
        if saved:
            self._pending.append((self._event(), saved))
        self._settle()

    def ready(self, slot: int) -> bool:
        """Whether the last page that was copied to the slot has its checksum, as of the last `run`."""
        return slot in self._sums

    def intact(self, slot: int) -> bool:
        """Whether the slot holds what arrived."""
        return self._sums.get(slot) == self._sum(slot)

    def _settle(self) -> None:
        """Computes checksums of pages that have arrived and have not been replaced since, in order."""
        while self._pending and (self._pending[0][0] is None or self._pending[0][0].query()):
            saved = self._pending.popleft()[1]
            self._arrived.update((slot, None) for slot, number in saved if self._newest[slot] == number)
        for slot in list(islice(self._arrived, self.sums_most)):
            del self._arrived[slot]
            self._sums[slot] = self._sum(slot)

    def _sum(self, slot: int) -> tuple[int, int]:
        """A change of any bit changes both; some 10 GB/s."""
        words = self._slots[slot].numpy().view(np.uint64)
        return int(np.bitwise_xor.reduce(words)), int(np.add.reduce(words))

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

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
            self._synchronize()
            began = time.perf_counter()
            work()
            self._synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._rows_LRN.device)


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


def _allocate(slots: int, nbytes: int, pinned: bool) -> Tensor:
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
