"""Storage of the KV cache: pages of rows, one row for each token and layer.

Attention defines what a row holds: kv_lora_rank + qk_rope_head_dim values for latent attention
(arXiv:2405.04434), keys and values of all key heads for grouped queries. Row page * page_size + offset of a
layer belongs to the token at that offset of the page.

Legend: W values of a row, S tokens of a sequence, P pages of a sequence, B sequences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_worker.errors import SettingsError

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0  # the largest number of e4m3


@dataclass(frozen=True)
class CacheShape:
    """layers, values of a row, tokens of a page, and the dtype they are stored in."""

    layers: int
    width: int
    page_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * self.width * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_size * self.bytes_per_token

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens of one sequence."""
        return -(-tokens // self.page_size)

    def pages_of(self, context: int, memory: int | None, sequences: int, room: int | None = None) -> int:
        """Pages in `memory` bytes; None: those of `sequences` sequences of `context` tokens, but no more than
        `room` bytes hold. Pages that sequences do not need keep prefixes.

        Raises SettingsError if not even one such sequence fits.
        """
        one = self.pages_for(context)
        if memory is None:
            batch = sequences * one * self.page_bytes
            memory = batch if room is None else min(batch, room)
        pages = memory // self.page_bytes
        if pages < one:
            shorter = f", or a context length of at most {pages * self.page_size}" if pages else ""
            raise SettingsError(
                f"KV memory of {memory} bytes is too small: one context of {context} tokens takes "
                f"{one * self.page_bytes} bytes; give at least that{shorter}"
            )
        return pages


@dataclass(frozen=True)
class PagedCache:
    """Storage for `pages` pages, and one more for the padding of fixed-size batches."""

    shape: CacheShape
    pages: int
    layers: tuple[Tensor, ...]  # [(pages + 1) * page_size, W] each

    @classmethod
    def allocate(cls, shape: CacheShape, pages: int, device: torch.device) -> "PagedCache":
        """Zeroed storage; on Linux CPUs a page takes memory when it is written.

        Raises SettingsError if the device has too little memory.
        """
        size = (shape.layers, (pages + 1) * shape.page_size, shape.width)
        try:
            layers = _zeros(size, shape.dtype, device)
        except (RuntimeError, MemoryError) as error:
            nbytes = math.prod(size) * shape.dtype.itemsize
            raise SettingsError(
                f"the KV cache of {pages} pages of {shape.page_size} tokens takes {nbytes} bytes, more than "
                f"{device} has free; lower the KV memory, the batch size or the context length"
            ) from error
        return cls(shape, pages, layers.unbind(0))

    @property
    def storage_LRN(self) -> Tensor:  # noqa: N802 - a tensor's name contains its shape
        """The rows of all layers as bytes, [layers, rows, bytes of a row]; a view."""
        rows, width = self.layers[0].shape
        size = (len(self.layers), rows, width)
        first = self.layers[0]  # `layers` are the parts of one tensor
        whole = first.as_strided(size, (rows * width, width, 1), first.storage_offset())
        return whole.view(torch.uint8)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.shape.page_size

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.layers[0].device

    def sequence(self, layer: int, pages: Sequence[int], length: int) -> Tensor:
        """The first `length` rows of a sequence, [S, W]; a view where its pages follow one another."""
        pages = pages[: self.shape.pages_for(length)]
        if all(page == pages[0] + index for index, page in enumerate(pages)):
            start = pages[0] * self.page_size
            return self.layers[layer][start : start + length]
        chosen = self._paged(layer).index_select(0, torch.tensor(pages, device=self.device))
        return chosen.view(self.shape.dtype).flatten(0, 1)[:length]

    def sequences(self, layer: int, pages_BP: Tensor, length: int) -> Tensor:
        """The first `length` rows of several sequences, [B, S, W], copied; rows after the end of a sequence
        are undefined.
        """
        count = self.shape.pages_for(length)
        chosen = self._paged(layer)[pages_BP[:, :count].long()]
        return chosen.view(self.shape.dtype).flatten(1, 2)[:, :length]

    def write(self, layer: int, rows_T: Tensor, values_TW: Tensor) -> None:
        """Stores values at rows, in the cache's dtype; e4m3 has no infinity, so values are clamped to its
        largest.
        """
        rows_SW = self.layers[layer]
        if self.shape.dtype is FP8:
            rounded_TW = values_TW.float().clamp(-FP8_MOST, FP8_MOST).to(FP8)
            rows_SW.view(torch.uint8).index_copy_(0, rows_T, rounded_TW.view(torch.uint8))
        else:
            rows_SW.index_copy_(0, rows_T, values_TW.to(self.shape.dtype))

    def _paged(self, layer: int) -> Tensor:
        """[pages, tokens, W]; torch indexes e4m3 only as bytes."""
        rows_SW = self.layers[layer]
        if self.shape.dtype is FP8:
            rows_SW = rows_SW.view(torch.uint8)
        return rows_SW.view(-1, self.page_size, self.shape.width)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros writes every page; numpy maps zero pages, which the kernel provides on first touch."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    nbytes = math.prod(size) * dtype.itemsize
    return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(size)
