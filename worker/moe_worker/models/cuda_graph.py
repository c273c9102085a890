"""Decode steps as CUDA graphs, one for each batch size of a few; smaller batches are padded.

Legend: B sequences, T = B tokens, P pages of a sequence, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.cuda import CudaModel, Rows


def batch_sizes(largest: int) -> list[int]:
    """Sizes that graphs are made for: powers of two, steps of 8 up to 64 and of 32 above, and `largest`.

    Padding goes to no expert, so that it costs little.
    """
    sizes = {1, 2, 4, largest} | set(range(8, min(largest, 64) + 1, 8)) | set(range(64, largest + 1, 32))
    return sorted(size for size in sizes if size <= largest)


class DecodeGraphs:
    """Decode over one cache. Fill the buffers with `fill`, then `run`; logits are in `logits_BV`.

    Rows behind the batch are padding: they write to the cache's page that belongs to nobody. On a device
    without graphs (interpreted kernels) a step runs as it is.
    """

    capture_mode = "global"

    def __init__(self, model: CudaModel, cache: PagedCache, largest: int, context: int) -> None:
        device = model.device
        self._model, self._cache = model, cache
        self.sizes = batch_sizes(largest)
        self._tokens_B = torch.zeros(largest, dtype=torch.int64, device=device)
        self._positions_B = torch.zeros(largest, dtype=torch.int64, device=device)
        self._rows_B = torch.full((largest,), cache.pages * cache.page_size, dtype=torch.int64, device=device)
        self._pages_BP = torch.full(
            (largest, cache.shape.pages_for(context)), cache.pages, dtype=torch.int32, device=device
        )
        self._valid = torch.zeros(1, dtype=torch.int32, device=device)
        self.logits_BV = model.empty_logits(largest)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def largest(self) -> int:
        """Sequences at most."""
        return self.sizes[-1]

    @property
    def cache(self) -> PagedCache:
        """What the graphs read and write."""
        return self._cache

    def record(self, each: Callable[[Iterable[int]], Iterable[int]] = lambda sizes: sizes) -> None:
        """Compiles the kernels and records all graphs, the largest first, so that the others fit its memory.

        each: wraps the sizes, for a progress bar.
        """
        if self._model.device.type != "cuda":
            return
        pool = torch.cuda.graph_pool_handle()
        for size in each(self.sizes[::-1]):
            self._record(size, pool)

    def size_for(self, count: int) -> int:
        """The smallest size for `count` sequences."""
        return self.sizes[bisect_left(self.sizes, count)]

    def fill(self, tokens_B: Tensor, rows: Rows, least: int = 0) -> int:
        """Takes in a batch; the size of the graph for it, which is `least` at least."""
        count = tokens_B.shape[0]
        size = self.size_for(max(count, least))
        self._tokens_B[:count].copy_(tokens_B)
        self._positions_B[:count].copy_(rows.positions_T)
        self._rows_B[:count].copy_(rows.rows_T)
        self._pages_BP[:count, : rows.pages_BP.shape[1]].copy_(rows.pages_BP)
        self._valid.fill_(count)
        if count < size:
            self._positions_B[count:size].zero_()
            self._rows_B[count:size].fill_(self._cache.pages * self._cache.page_size)
            self._pages_BP[count:size, 0].fill_(self._cache.pages)
        return size

    def run(self, size: int) -> None:
        """One step of a batch of `size`, which `fill` gave."""
        graph = self._graphs.get(size)
        if graph is None:
            self._step(size)
        else:
            graph.replay()

    def _record(self, size: int, pool: Any) -> None:
        self._graphs[size] = self._captured(lambda: self._step(size), pool)

    def _captured(self, step: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=self.capture_mode):
            step()
        return graph

    def _step(self, size: int) -> None:
        rows = Rows(self._positions_B[:size], self._rows_B[:size], self._pages_BP[:size])
        shared = self._model.decode_pass(rows, self._cache.page_size, self._valid)
        x_BD, added = self._model.forward(self._tokens_B[:size], shared, self._cache.layers)
        self._model.logits(x_BD, added, self.logits_BV[:size])
