"""Pinned CPU memory for pages of a GPU's cache. Copies run while steps do, on two streams of their own.

A page leaves in two hops: the stream that computes steps gathers it into a frame on the GPU, so that its
place can be overwritten at once, and the stream of `_out` copies the frame to its slot. It comes back in two
hops, too: the stream of `_in` copies the slot to a frame, and once that has arrived, the next `run` scatters
the frame into the cache. Steps wait for a copy only if pages are evicted faster than they leave, and all
frames are full.

The GPU computes the checksums, in the frame that a page leaves from and in the one that it arrives in. So
they cover CPU memory and both ways through the bus.

Legend: L layers, P pages of the cache, X words of a page in one layer, B bytes of a frame, C pages that are
copied together.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from moe_worker.kvcache.frames import Frames, PageSize, is_done, merged, words
from moe_worker.kvcache.host import allocate, slots_in, whole_words
from moe_worker.kvcache.offload import Move
from moe_worker.kvcache.paged import PagedCache

_TRIALS = 4
TOGETHER = 64
"""Pages that one copy takes at most."""
LEAVING = 256 << 20
"""Bytes of the GPU's memory for pages that leave."""
ARRIVING = 128 << 20
"""Bytes of the GPU's memory for pages that come back."""


class _Copy(NamedTuple):
    """Pages on their way to slots, or to frames.

    slots: each with the number of its save, or of its fetch. sums_C2: in pinned memory.
    """

    done: torch.cuda.Event | None
    slots: list[tuple[int, int]]
    sums_C2: Tensor


class PinnedPages:
    """As many slots as fit into `memory` bytes: an `offload.Storage`. A cache on a CPU works, too, for tests.

    Attributes:
        slots: their number.
        page_s: seconds that a page takes to come back, of TOGETHER pages; the shortest of some trials.

    Raises SettingsError if not one page fits, or the machine has not so much memory to pin.
    """

    def __init__(self, cache: PagedCache, memory: int) -> None:
        rows_LRN, tokens, device = cache.storage_LRN, cache.page_size, cache.device
        layers, _, width = rows_LRN.shape
        nbytes = layers * tokens * width
        size = PageSize(layers, nbytes, whole_words(nbytes))
        counts = slots_in(memory, nbytes, pinned=True)
        self.slots = sum(counts)
        self._device = device
        self._blocks = [allocate(count, size.padded, device.type == "cuda") for count in counts]
        self._places = [(block, row) for block, count in enumerate(counts) for row in range(count)]
        self._pages_PLX = words(rows_LRN.view(layers, -1, tokens * width).transpose(0, 1))
        self._out, self._in = (Frames(count, size, device) for count in _frames(self.slots, size.padded))
        self._sums: dict[int, tuple[int, int]] = {}
        self._newest: dict[int, int] = {}
        self._saves = 0
        self._departures: deque[_Copy] = deque()
        self._left: deque[tuple[range, torch.cuda.Event | None]] = deque()
        """Frames whose pages leave, oldest first, and when they have left."""
        self._next = 0
        self._free = deque(range(len(self._in)))
        self._frame_of: dict[int, tuple[int, int]] = {}
        """By slot: the frame, and the number of the fetch."""
        self._fetches = 0
        self._arrivals: deque[_Copy] = deque()
        self._found: dict[int, tuple[int, int]] = {}
        """Checksums of pages that have arrived in their frames."""
        self._promised: set[int] = set()
        """Slots whose frames the next `run` reads."""
        self._scattered: torch.cuda.Event | None = None
        self.page_s = self._measure()

    @torch.inference_mode()
    def run(self, moves: Sequence[Move]) -> None:
        """Starts the copies, in order; does not wait."""
        first = 0
        for index, move in enumerate(moves):
            if move.saves is not moves[first].saves:
                self._start(moves[first:index])
                first = index
        self._start(moves[first:])
        for slot in self._promised:
            self._drop(slot)
        self._promised.clear()
        self._settle()

    @torch.inference_mode()
    def fetch(self, slots: Iterable[int]) -> None:
        """Starts to bring pages to the GPU, in order, as many as there are frames for.

        A page keeps its frame until it is used or forgotten: two requests that took each other's frames would
        wait for ever. Who gets a frame has its first page in one, so somebody goes on.
        """
        self._settle()
        wanted = dict.fromkeys(islice(slots, len(self._in)))
        taken = [slot for slot in wanted if slot not in self._frame_of][: len(self._free)]
        for first in range(0, len(taken), TOGETHER):
            self._arrive(taken[first : first + TOGETHER])

    def ready(self, slot: int) -> bool:
        """Whether the last page that was copied to the slot has arrived, as of the last `run`."""
        return slot in self._sums

    def intact(self, slot: int) -> bool | None:
        """Whether the slot holds what arrived there; None: it is not on the GPU yet, `fetch` it."""
        found = self._found.get(slot)
        if found is None:
            return None
        if found != self._sums.get(slot):
            self._drop(slot)
            return False
        self._promised.add(slot)
        return True

    def forget(self, slot: int) -> None:
        """The frame of the page is free."""
        if slot not in self._promised:
            self._drop(slot)

    def wait(self) -> None:
        """Waits for the oldest pages that come back; returns at once if there are none."""
        if self._arrivals and self._arrivals[0].done is not None:
            self._arrivals[0].done.synchronize()

    def _start(self, moves: Sequence[Move]) -> None:
        if moves and moves[0].saves:
            for first in range(0, len(moves), self._together):
                self._leave(moves[first : first + self._together])
        elif moves:
            self._scatter(moves)

    @property
    def _together(self) -> int:
        return min(TOGETHER, len(self._out))

    def _leave(self, moves: Sequence[Move]) -> None:
        frames = self._take_frames(len(moves))
        taken_CB = self._out.all_FB[frames.start : frames.stop]
        index = self._out.index([page for _, page, _ in moves])
        self._out.pages(taken_CB).copy_(self._pages_PLX[index])
        gathered, saved = self._out.mark(), []
        for slot, _, _ in moves:
            self._saves += 1
            self._newest[slot] = self._saves
            self._sums.pop(slot, None)
            self._drop(slot)
            saved.append((slot, self._saves))
        places = [self._places[slot] for slot, _, _ in moves]
        with self._out.on_stream():
            self._out.wait_for(gathered)
            sums_C2 = self._out.sums(taken_CB)
            for block, row, frame, count in merged(zip(places, frames, strict=True)):
                copied_CB = self._out.all_FB[frame : frame + count]
                self._blocks[block][row : row + count].copy_(copied_CB, non_blocking=True)
            done = self._out.mark()
        self._left.append((frames, done))
        self._departures.append(_Copy(done, saved, sums_C2))

    def _take_frames(self, count: int) -> range:
        """The next frames; steps wait until what was in them has left, the host does not."""
        first = self._next if self._next + count <= len(self._out) else 0
        frames = range(first, first + count)
        self._next = frames.stop
        while any(old.start < frames.stop and frames.start < old.stop for old, _ in self._left):
            left = self._left.popleft()[1]
            if left is not None:
                torch.cuda.current_stream(self._device).wait_event(left)
        return frames

    def _arrive(self, slots: list[int]) -> None:
        frames, fetched = [self._free.popleft() for _ in slots], []
        for slot, frame in zip(slots, frames, strict=True):
            self._fetches += 1
            self._frame_of[slot] = frame, self._fetches
            fetched.append((slot, self._fetches))
        places = [self._places[slot] for slot in slots]
        with self._in.on_stream():
            self._in.wait_for(self._scattered)
            for block, row, frame, count in merged(zip(places, frames, strict=True)):
                copied_CB = self._in.all_FB[frame : frame + count]
                copied_CB.copy_(self._blocks[block][row : row + count], non_blocking=True)
            sums_C2 = self._in.sums(self._in.all_FB[self._in.index(frames)])
            self._arrivals.append(_Copy(self._in.mark(), fetched, sums_C2))

    def _scatter(self, moves: Sequence[Move]) -> None:
        frames = self._in.index([self._frame_of[slot][0] for slot, _, _ in moves])
        pages = self._in.index([page for _, page, _ in moves])
        self._pages_PLX[pages] = self._in.pages(self._in.all_FB)[frames]
        self._scattered = self._in.mark()

    def _settle(self) -> None:
        """Notes what has left or arrived, and has not been replaced since."""
        for slot, number, sums in _finished(self._departures):
            if self._newest[slot] == number:
                self._sums[slot] = sums
        for slot, number, sums in _finished(self._arrivals):
            if self._frame_of.get(slot, (0, 0))[1] == number:
                self._found[slot] = sums

    def _drop(self, slot: int) -> None:
        """Frees the frame of a slot, if it has one. What still arrives there does so before anything else."""
        if slot in self._frame_of:
            self._free.append(self._frame_of.pop(slot)[0])
            self._found.pop(slot, None)

    def _measure(self) -> float:
        slots = list(range(min(TOGETHER, self.slots, len(self._in))))
        times = []
        for _ in range(_TRIALS):
            self._synchronize()
            began = time.perf_counter()
            self.fetch(slots)
            self._synchronize()
            self._settle()
            self._promised.update(slots)
            self.run([Move(slot, len(self._pages_PLX) - 1, saves=False) for slot in slots])
            self._synchronize()
            times.append((time.perf_counter() - began) / len(slots))
        return min(times)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def frame_bytes(memory: int, page: int) -> int:
    """Bytes of the GPU's memory for `memory` bytes of CPU memory and pages of `page` bytes."""
    slots, size = sum(slots_in(memory, page, pinned=True)), whole_words(page)
    return sum(Frames.bytes_of(count, size) for count in _frames(slots, size))


def _frames(slots: int, size: int) -> tuple[int, int]:
    """Frames of `size` bytes for pages that leave, and for those that come back."""
    leaving, arriving = (max(1, min(most // size, slots)) for most in (LEAVING, ARRIVING))
    return leaving, arriving


def _finished(copies: deque[_Copy]) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Removes the copies that are done, oldest first: each slot with its number and checksum."""
    while copies and is_done(copies[0].done):
        _, slots, sums_C2 = copies.popleft()
        for (slot, number), (plain, weighted) in zip(slots, sums_C2.tolist(), strict=True):
            yield slot, number, (plain, weighted)
