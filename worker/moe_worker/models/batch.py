"""The input of one forward pass as tensors on the device.

Legend: T tokens of all sequences, one sequence after the other, B sequences, P pages of the longest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_worker.kernels.transfer import to_device
from moe_worker.kvcache.paged import PagedCache


@dataclass(frozen=True)
class Segment:
    """The next tokens of one sequence: `tokens`, the first at position `start`.

    `pages`: the cache pages of the sequence in order, enough for all its tokens including these (preferably
    an array of ints: a step copies thousands). shard: where the pages are, if sequences are spread over
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
    def count(self) -> int:
        """Tokens in this forward pass."""
        return len(self.tokens)

    @property
    def end(self) -> int:
        """Length of the sequence once these tokens are in the cache."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """One forward pass: decode (one token a sequence), prefill (many tokens of one), or both, decodes first.

    tokens_T, positions_T: int64. rows_T: int64, the cache row that each token is written to. lengths_B:
    int32, tokens of a sequence in the cache after this pass. pages_BP: int32, page numbers, 0 after the last
    page of a sequence. decodes: number of leading segments with one token.
    """

    segments: tuple[Segment, ...]
    tokens_T: Tensor
    positions_T: Tensor
    rows_T: Tensor
    lengths_B: Tensor
    pages_BP: Tensor
    decodes: int

    @classmethod
    def of(cls, segments: Sequence[Segment], cache: PagedCache) -> "Batch":
        """The batch of `segments` (perhaps none) over `cache`; segments of one token must come first."""
        decodes = next((i for i, segment in enumerate(segments) if segment.count > 1), len(segments))
        pages_BP = _page_tables(segments)
        starts_B = np.array([segment.start for segment in segments], np.int64)
        counts_B = np.array([segment.count for segment in segments], np.int64)
        sequence_T = np.repeat(np.arange(len(segments)), counts_B)
        first_T = np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
        places_T: NDArray[np.int64] = starts_B[sequence_T] + np.arange(len(sequence_T)) - first_T
        size = cache.page_size
        page_T = pages_BP[sequence_T, places_T // size].astype(np.int64)
        tokens = np.array([token for segment in segments for token in segment.tokens], np.int64)
        tokens_T, positions_T, rows_T = aligned_parts(
            (tokens, places_T, page_T * size + places_T % size), cache.device
        )
        lengths_B, pages_N = aligned_parts(
            ((starts_B + counts_B).astype(np.int32), pages_BP.ravel()), cache.device
        )
        return cls(
            segments=tuple(segments),
            tokens_T=tokens_T,
            positions_T=positions_T,
            rows_T=rows_T,
            lengths_B=lengths_B,
            pages_BP=pages_N.view(pages_BP.shape),
            decodes=decodes,
        )

    @cached_property
    def starts(self) -> Tensor:
        """First token of each sequence, and T: int32 [B + 1], on the CPU."""
        return torch.tensor([0, *accumulate(segment.count for segment in self.segments)], dtype=torch.int32)

    @property
    def last_rows(self) -> list[int]:
        """Index in T of the last token of each sequence."""
        rows, total = [], 0
        for segment in self.segments:
            total += segment.count
            rows.append(total - 1)
        return rows


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
    pages_BP = np.zeros(
        (len(segments), max((len(segment.pages) for segment in segments), default=0)), np.int32
    )
    for row_P, segment in zip(pages_BP, segments, strict=True):
        row_P[: len(segment.pages)] = segment.pages
    return pages_BP
