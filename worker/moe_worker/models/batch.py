"""The input of one forward pass: arrays on the host, and the same as tensors on the device.

Legend: T tokens of all sequences, one sequence after the other, B sequences, P pages of the longest one, N
tokens that an earlier step samples.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_worker.kernels.transfer import to_device
from moe_worker.kvcache.paged import PagedCache


class Segment(NamedTuple):
    """The next tokens of one sequence: `tokens`, the first at position `start`. A tuple: steps have hundreds.

    `pages`: the cache pages of the sequence in order, enough for all its tokens including these (preferably
    an array of C ints: a step copies thousands). shard: where the pages are, if sequences are spread over
    several. source: the row of an earlier step that samples the last of `tokens`, if the host does not know
    it yet; else -1. behind: which step, counted back from the newest one that has sampled.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    shard: int = 0
    source: int = -1
    behind: int = 1

    @property
    def size(self) -> int:
        """Tokens in this forward pass."""
        return len(self.tokens)

    @property
    def end(self) -> int:
        """Length of the sequence once these tokens are in the cache."""
        return self.start + len(self.tokens)


class Fed(NamedTuple):
    """Tokens that only the device knows: those at `rows` of `tokens_N`, int64, go to `places` in T."""

    tokens_N: Tensor
    rows: Sequence[int]
    places: Sequence[int]

    def copy(self, into_T: Tensor) -> None:
        """Writes them to `into_T`, on the device."""
        count = len(self.rows)
        if count == self.tokens_N.shape[0] and self.rows == self.places == list(range(count)):
            into_T[:count].copy_(self.tokens_N)
            return
        index_2N = to_device(torch.tensor((self.rows, self.places)), into_T.device)
        into_T.index_copy_(0, index_2N[1], self.tokens_N[index_2N[0]])


class Extent(NamedTuple):
    """How large a batch is: tokens of its segments, of which the first `singles` have one; the tokens up to
    which each attends; and how many logits are wanted.
    """

    counts: Sequence[int]
    lengths: Sequence[int]
    singles: int
    rows: int

    @classmethod
    def of(cls, counts: Sequence[int], lengths: Sequence[int], rows: int) -> "Extent":
        """Of segments in the order of a Batch."""
        singles = next((place for place, count in enumerate(counts) if count > 1), len(counts))
        return cls(counts, lengths, singles, rows)


@dataclass(frozen=True)
class Batch:
    """One forward pass: decode (one token a sequence), prefill (many tokens of one), or both, decodes first.

    On the host: tokens, positions, and rows, the cache row that each token is written to, int64 [T]; pages,
    int32 [B, P], page numbers, 0 after the last page of a sequence. fed: tokens that the host does not know.
    decodes: number of leading segments with one token.
    """

    segments: Sequence[Segment]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    pages: NDArray[np.int32]
    fed: Sequence[Fed]
    decodes: int
    device: torch.device

    @classmethod
    def of(cls, segments: Sequence[Segment], cache: PagedCache, fed: Sequence[Fed] = ()) -> "Batch":
        """The batch of `segments` (perhaps none) over `cache`; segments of one token must come first."""
        tokens = list(chain.from_iterable([segment.tokens for segment in segments]))
        starts = [segment.start for segment in segments]
        pages_BP, size, decodes = _page_tables(segments), cache.page_size, len(segments)
        if len(tokens) == decodes:
            # One call of numpy: after a step on the CPU, the code of each other one has left the caches.
            places = zip(segments, starts, strict=True)
            rows = [segment.pages[start // size] * size + start % size for segment, start in places]
            inputs = np.array((tokens, starts, rows), np.int64)
        else:
            counts_B = np.array([len(segment.tokens) for segment in segments])
            decodes = int(np.argmax(counts_B > 1))
            sequences = np.repeat(np.arange(len(segments)), counts_B)
            first_B = np.cumsum(counts_B) - counts_B
            inputs = np.empty((3, len(tokens)), np.int64)
            inputs[0] = tokens
            inputs[1] = np.arange(len(tokens)) + (np.array(starts) - first_B)[sequences]
            inputs[2] = pages_BP[sequences, inputs[1] // size].astype(np.int64) * size + inputs[1] % size
        return cls(segments, inputs[0], inputs[1], inputs[2], pages_BP, fed, decodes, cache.device)

    @cached_property
    def tokens_T(self) -> Tensor:  # noqa: N802 - a tensor's name contains its shape
        """Tokens, int64, with those that only the device knows."""
        tokens_T = self._on_device(self.tokens)
        for fed in self.fed:
            fed.copy(tokens_T)
        return tokens_T

    @cached_property
    def positions_T(self) -> Tensor:  # noqa: N802
        """Positions, int64."""
        return self._on_device(self.positions)

    @cached_property
    def rows_T(self) -> Tensor:  # noqa: N802
        """Rows of the cache, int64."""
        return self._on_device(self.rows)

    @cached_property
    def pages_BP(self) -> Tensor:  # noqa: N802
        """Page numbers, int32."""
        return self._on_device(self.pages)

    @cached_property
    def lengths_B(self) -> Tensor:  # noqa: N802
        """Tokens of each sequence in the cache after this pass, int32."""
        return self._on_device(np.array([segment.end for segment in self.segments], np.int32))

    @cached_property
    def starts(self) -> Tensor:
        """First token of each sequence, and T: int32 [B + 1], on the CPU."""
        return torch.from_numpy(np.array([0, *self._ends], np.int32))

    @property
    def last_rows(self) -> list[int]:
        """Index in T of the last token of each sequence."""
        return [end - 1 for end in self._ends]

    @property
    def _ends(self) -> Sequence[int]:
        count = len(self.segments)
        if self.decodes == count:
            return range(1, count + 1)
        return list(accumulate([len(segment.tokens) for segment in self.segments]))

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(values), self.device)


def aligned_parts(parts: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Vectors of one dtype on `device`, in one copy.

    Each begins at a multiple of 16 bytes: Triton compiles another variant of a kernel for unaligned pointers.
    """
    step = 16 // parts[0].itemsize
    sizes = [len(part) + -len(part) % step for part in parts]
    whole = np.zeros(sum(sizes), parts[0].dtype)
    for part, end, size in zip(parts, accumulate(sizes), sizes, strict=True):
        whole[end - size : end - size + len(part)] = part
    pieces = to_device(torch.from_numpy(whole), device).split(sizes)
    return [piece[: len(part)] for piece, part in zip(pieces, parts, strict=True)]


def _page_tables(segments: Sequence[Segment]) -> NDArray[np.int32]:
    """One row a segment, 0 after its last page."""
    tables = [segment.pages for segment in segments]
    rows = [(table if isinstance(table, array) else array("i", table)).tobytes() for table in tables]
    width = max(map(len, rows), default=0)
    whole = bytearray().join([row.ljust(width, b"\0") for row in rows])
    return np.frombuffer(whole, np.int32).reshape(len(rows), width // 4)
