"""Decode steps as CUDA graphs, one for each batch size of a few; smaller batches are padded.

Legend: B sequences, T = B tokens, P pages of a sequence, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_worker.kernels.likeliest import Likeliest
from moe_worker.kernels.transfer import Staging, to_device
from moe_worker.kernels.triton.greedy import best_tokens
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.cuda import CudaModel, Rows
from moe_worker.models.cuda_counts import Totals


def batch_sizes(largest: int) -> list[int]:
    """Sizes that graphs are made for: powers of two, steps of 8 up to 64 and of 32 above, and `largest`.

    Padding goes to no expert, so that it costs little.
    """
    sizes = {1, 2, 4, largest} | set(range(8, min(largest, 64) + 1, 8)) | set(range(64, largest + 1, 32))
    return sorted(size for size in sizes if size <= largest)


def captured(step: Callable[[], object], pool: Any, mode: str) -> torch.cuda.CUDAGraph:
    """What `step` launches, as a graph. Raises what `step` raises.

    torch.cuda.graph alone would raise that of a capture that cannot end, and leave its stream current.
    """
    graph, failed = torch.cuda.CUDAGraph(), None
    before = torch.cuda.stream(torch.cuda.current_stream())
    try:
        with before, torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
            try:
                step()
            except Exception as error:
                failed = error
                raise
    except RuntimeError as error:
        if failed is None or error is failed:
            raise
        raise failed from error
    return graph


class DecodeGraphs:
    """Decode over one cache. Fill the buffers with `fill`, then `run`; logits are in `logits_BV`.

    A step ends with what follows on the device, since each launch outside a graph takes the host longer than
    the device: the likeliest tokens, and the sums of `totals`.

    Rows behind the batch are padding: they write to the cache's page that belongs to nobody. On a device
    without graphs (interpreted kernels) a step runs as it is.
    """

    capture_mode = "global"

    def __init__(self, model: CudaModel, cache: PagedCache, largest: int, context: int) -> None:
        device = model.device
        self._model, self._cache = model, cache
        self.sizes = batch_sizes(largest)
        # Rows begin at multiples of 16 bytes, as Triton's kernels expect.
        self._inputs_4B = torch.zeros(4, largest + largest % 2, dtype=torch.int64, device=device)
        self._tokens_B, self._positions_B, self._rows_B, valid = self._inputs_4B
        self._valid = valid.view(torch.int32)[:1]
        self._rows_B.fill_(cache.pages * cache.page_size)
        self._staging = Staging(self._inputs_4B)
        self._pages_BP = torch.full(
            (largest, cache.shape.pages_for(context)), cache.pages, dtype=torch.int32, device=device
        )
        self._sent_BP = np.full(self._pages_BP.shape, cache.pages, np.int32)  # what `_pages_BP` will hold
        self.logits_BV = model.empty_logits(largest)
        self.totals = Totals(model)
        self._likeliest: dict[int, Likeliest] = {}
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

    def compile(self) -> None:
        """Computes each step once, so that `record` finds its kernels compiled."""
        for size in self.sizes[::-1]:
            self._step(size)
        torch.cuda.synchronize()

    def forget(self) -> None:
        """Drops all graphs; `record` makes new ones, which write to nobody's page alone meanwhile."""
        self._graphs.clear()
        self._inputs_4B.zero_()
        self._rows_B.fill_(self._cache.pages * self._cache.page_size)
        self._pages_BP.fill_(self._cache.pages)
        self._sent_BP.fill(self._cache.pages)

    def size_for(self, count: int) -> int:
        """The smallest size for `count` sequences."""
        return self.sizes[bisect_left(self.sizes, count)]

    def fill(self, batch: Batch, least: int = 0) -> int:
        """Takes in a batch; the size of the graph for it, which is `least` at least."""
        count = len(batch.tokens)
        size = self.size_for(max(count, least))
        tokens_B, positions_B, rows_B, valid = self._staging.buffer()
        tokens_B[:count], tokens_B[count:] = batch.tokens, 0
        positions_B[:count], positions_B[count:] = batch.positions, 0
        rows_B[:count], rows_B[count:] = batch.rows, self._cache.pages * self._cache.page_size
        valid[0] = count
        self._staging.copy()
        for fed in batch.fed:
            fed.copy(self._tokens_B)
        self._fill_pages(batch.pages, size)
        return size

    def _fill_pages(self, pages_BP: NDArray[np.int32], size: int) -> None:
        """Copies the page table if it has changed, which it has where a sequence begins a page."""
        count, most = pages_BP.shape
        sent_BP = self._sent_BP[:count, :most]
        if not np.array_equal(sent_BP, pages_BP):
            self._pages_BP[:count, :most].copy_(to_device(torch.from_numpy(pages_BP), self._pages_BP.device))
            sent_BP[:] = pages_BP
        padding_B = self._sent_BP[count:size, 0]
        if (padding_B != self._cache.pages).any():
            self._pages_BP[count:size, 0].fill_(self._cache.pages)
            padding_B[:] = self._cache.pages

    def run(self, size: int) -> None:
        """One step of a batch of `size`, which `fill` gave."""
        graph = self._graphs.get(size)
        if graph is None:
            self._step(size)
        else:
            graph.replay()

    def likeliest(self, size: int, count: int) -> Likeliest:
        """Of the first `count` rows, by the last step of a batch of `size`; valid until the next one."""
        return Likeliest(*(each_B[:count] for each_B in self._likeliest[size]))

    def _record(self, size: int, pool: Any) -> None:
        self._graphs[size] = self._captured(lambda: self._step(size), pool)

    def _captured(self, step: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
        step()
        torch.cuda.synchronize()
        return captured(step, pool, self.capture_mode)

    def _step(self, size: int) -> None:
        rows = Rows(self._positions_B[:size], self._rows_B[:size], self._pages_BP[:size])
        shared = self._model.decode_pass(rows, self._cache.page_size, self._valid)
        x_BD, added = self._model.forward(self._tokens_B[:size], shared, self._cache.layers)
        self._model.logits(x_BD, added, self.logits_BV[:size])
        self._likeliest[size] = Likeliest(*best_tokens(self.logits_BV[:size]))
        self.totals.add()
