"""Frames: room on a GPU for pages on their way from or to CPU memory, with a stream that copies them.

Without a GPU the same happens at once, for tests.

Legend: F frames, B bytes of a frame, C frames of one copy, L layers, X words of a page in one layer, W words.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from moe_worker.kvcache.host import WORD

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class PageSize(NamedTuple):
    """layers, bytes of all, and bytes of a frame, which are padded to whole words."""

    layers: int
    nbytes: int
    padded: int


class Run(NamedTuple):
    """Places of CPU memory, `length` from `row` of `block` on, for the frames from `frame` on."""

    block: int
    row: int
    frame: int
    length: int


class Frames:
    """`count` frames on `device`.

    Attributes:
        all_FB: uint8.
    """

    def __init__(self, count: int, size: PageSize, device: torch.device) -> None:
        self.all_FB = torch.zeros(count, size.padded, dtype=torch.uint8, device=device)
        self._size = size
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._weights_W = torch.arange(1, 2 * (size.padded // WORD), 2, device=device)

    @staticmethod
    def bytes_of(count: int, size: int) -> int:
        """Bytes of `count` frames of `size` bytes, and of the weights of their words."""
        return (count + 1) * size

    def __len__(self) -> int:
        return len(self.all_FB)

    def on_stream(self) -> AbstractContextManager[object]:
        """What is computed in it runs on the stream of the copies."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """The stream waits for an event; the host does not."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def pages(self, frames_CB: Tensor) -> Tensor:
        """A view of the pages in frames, [C, L, X]."""
        return words(frames_CB[:, : self._size.nbytes].unflatten(1, (self._size.layers, -1)))

    def index(self, places: Sequence[int]) -> Tensor:
        """int64 on the device; the host does not wait."""
        index_C = torch.tensor(places, dtype=torch.int64, pin_memory=self._stream is not None)
        return index_C.to(self._device, non_blocking=True)

    def sums(self, frames_CB: Tensor) -> Tensor:
        """[C, 2] int64, on their way to the host: the sum of a frame's words, and their sum by odd weights.

        A change of one bit, or of one word, changes both; so does nearly every other one.
        """
        words_CW = frames_CB.view(torch.int64)
        sums_C2 = torch.stack((words_CW.sum(1), (words_CW * self._weights_W).sum(1)), 1)
        if self._stream is None:
            return sums_C2
        pinned_C2 = torch.empty(sums_C2.shape, dtype=torch.int64, pin_memory=True)
        return pinned_C2.copy_(sums_C2, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """What the current stream has done when it gets here; None without a GPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def words(values: Tensor) -> Tensor:
    """A view of bytes as the widest integers that divide the last dimension; torch copies those fastest."""
    dtype = next(each for each in _INTEGERS if values.shape[-1] % each.itemsize == 0)
    return values.view(dtype)


def is_done(event: torch.cuda.Event | None) -> bool:
    """Whether a stream has got to the event."""
    return event is None or event.query()


def merged(pairs: Iterable[tuple[tuple[int, int], int]]) -> Iterator[Run]:
    """One copy for places that follow one another, if their frames do; pairs: (block, row) and frame."""
    run: Run | None = None
    for (block, row), frame in pairs:
        if run is not None and (block, row - run.length, frame - run.length) == run[:3]:
            run = run._replace(length=run.length + 1)
            continue
        if run is not None:
            yield run
        run = Run(block, row, frame, 1)
    if run is not None:
        yield run
