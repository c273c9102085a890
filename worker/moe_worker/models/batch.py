"""What one pass of the model computes, as tensors on its device.

Legend: T tokens of all sequences one behind the other, B sequences, P pages of the longest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.kvcache.paged import PagedCache


@dataclass(frozen=True)
class Segment:
    """The next tokens of one sequence: `tokens`, the first at position `start`.

    `pages` are the cache pages of the sequence in order, enough for all its tokens up to these.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]

    @property
    def count(self) -> int:
        """Tokens in this pass."""
        return len(self.tokens)

    @property
    def end(self) -> int:
        """Length of the sequence once these tokens are in the cache."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """One pass: decode (one token a sequence), prefill (many tokens of one), or both, decodes first.

    tokens_T, positions_T: int64. rows_T: int64, the row of each layer's cache that a token's entry goes to.
    lengths_B: int32, tokens of a sequence in the cache once this pass has written its own.
    pages_BP: int32, page numbers, 0 behind a sequence's last.
    decodes: how many of the leading segments have one token.
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
        """Places `segments` in `cache`; those of one token must come before longer ones."""
        device, size = cache.device, cache.page_size
        positions = [p for segment in segments for p in range(segment.start, segment.end)]
        rows = [
            segment.pages[p // size] * size + p % size
            for segment in segments
            for p in range(segment.start, segment.end)
        ]
        longest = max(len(segment.pages) for segment in segments)
        pages = [[*segment.pages, *[0] * (longest - len(segment.pages))] for segment in segments]
        return cls(
            segments=tuple(segments),
            tokens_T=torch.tensor([token for segment in segments for token in segment.tokens], device=device),
            positions_T=torch.tensor(positions, device=device),
            rows_T=torch.tensor(rows, device=device),
            lengths_B=torch.tensor([segment.end for segment in segments], dtype=torch.int32, device=device),
            pages_BP=torch.tensor(pages, dtype=torch.int32, device=device),
            decodes=next((i for i, segment in enumerate(segments) if segment.count > 1), len(segments)),
        )

    @property
    def last_rows(self) -> list[int]:
        """Where in T each sequence's last token stands."""
        rows, total = [], 0
        for segment in self.segments:
            total += segment.count
            rows.append(total - 1)
        return rows
