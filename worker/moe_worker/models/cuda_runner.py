"""Runs the engine's batches on the GPU: by graphs, but for passes that are too large for one.

Legend: T tokens of a pass, N tokens whose logits are wanted, V vocabulary.
"""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moe_worker.kernels.likeliest import Likeliest
from moe_worker.kernels.transfer import to_device
from moe_worker.kernels.triton import compiling, draw
from moe_worker.kernels.triton.expanded import SPLIT_CONTEXT
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.cuda import MOST_EXPANDED_BYTES, CudaModel, Rows
from moe_worker.models.cuda_counts import CudaExpertCounter
from moe_worker.models.cuda_graph import DecodeGraphs
from moe_worker.models.cuda_prompts import PromptGraphs, Size
from moe_worker.progress import bar

log = logging.getLogger(__name__)


class CudaRunner:
    """A Runner over `cache`, for batches of up to `largest` sequences of up to `context` tokens."""

    def __init__(
        self, model: CudaModel, cache: PagedCache, largest: int, context: int, prefill_tokens: int,
        progress: bool = False,
    ) -> None:  # fmt: skip
        self._model = model
        self.graphs = DecodeGraphs(model, cache, largest, context)
        self.prompts = PromptGraphs(model, self.graphs, context, prefill_tokens)
        self._likeliest: Likeliest | None = None

        def shown(sizes: Iterable[int]) -> Iterable[int]:
            return bar(sizes, desc="recording CUDA graphs", unit="graph", disable=not progress)

        def shown_prompts(sizes: Iterable[Size]) -> Iterable[Size]:
            return bar(sizes, desc="recording CUDA graphs of prompts", unit="graph", disable=not progress)

        if model.device.type != "cuda":
            return
        sizes = warm_sizes(prefill_tokens + largest)
        with compiling.counted() as compiled:
            with compiling.ahead():
                self.graphs.compile()
                self.prompts.compile()
                self._compute_sizes(sizes)
            self.graphs.record(shown)
            self.prompts.record(shown_prompts)
            self._compute_sizes(bar(sizes, desc="compiling prefill", unit="size", disable=not progress))
            torch.cuda.empty_cache()
        log.info("%s", compiled)

    def _compute_sizes(self, sizes: Iterable[int]) -> None:
        for tokens in sizes:
            self._warm(tokens)
        self.graphs.totals.add()
        draw.warm(self._model.vocabulary, self.graphs.logits_BV.dtype, self._model.device)

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """Runs a pass, writing the cache; [N, V] for the tokens at `rows`. Valid until the next pass."""
        whole = len(rows) == batch.decodes == len(batch.segments)
        if whole and cache is self.graphs.cache and len(rows) <= self.graphs.largest:
            size = self.graphs.fill(batch)
            self.graphs.run(size)
            self._likeliest = self.graphs.likeliest(size, len(rows))
            return self.graphs.logits_BV[: len(rows)]
        prompts_size = self.prompts.size(batch, rows) if cache is self.graphs.cache else None
        if prompts_size is not None:
            self.prompts.fill(batch, rows, prompts_size)
            self.prompts.run(prompts_size)
            self._likeliest = self.prompts.likeliest(len(rows))
            return self.graphs.logits_BV[: len(rows)]
        self._likeliest = None
        return self._eager(batch, cache, rows)

    def likeliest(self) -> Likeliest | None:
        """See FindsLikeliest: captured passes do."""
        return self._likeliest

    def expert_counter(self) -> CudaExpertCounter:
        """Counts from now on."""
        return CudaExpertCounter(self._model, self.graphs.totals)

    @torch.inference_mode()
    def _warm(self, tokens: int) -> None:
        """A pass over `tokens` tokens, so that its kernels are compiled; it writes to nobody's page alone.

        Where memory is too short for it, the engine takes smaller steps, too.
        """
        cache, device = self.graphs.cache, self._model.device
        zeros_T = torch.zeros(tokens, dtype=torch.int64, device=device)
        pages = cache.shape.pages_for(max(tokens, SPLIT_CONTEXT))
        nobody_BP = torch.full((1, pages), cache.pages, dtype=torch.int32, device=device)
        rows = Rows(zeros_T, torch.full_like(zeros_T, cache.pages * cache.page_size), nobody_BP)
        try:
            # Attention expands the context of many tokens, in KV splits if it is long, and one that is too
            # long it does not.
            for length in (tokens, max(tokens, SPLIT_CONTEXT), MOST_EXPANDED_BYTES):
                shared = self._model.prefill_pass([tokens], rows, cache.page_size, [length])
                x_TD, added = self._model.forward(zeros_T, shared, cache.layers)
            rows_N = zeros_T[: self.graphs.largest]
            out_NV = self._model.empty_logits(rows_N.shape[0])
            self._model.logits(x_TD[rows_N], added.of_tokens(rows_N, tokens), out_NV)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()

    def _eager(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        model = self._model
        placed = Rows(batch.positions_T, batch.rows_T, batch.pages_BP)
        counts = [segment.size for segment in batch.segments]
        lengths = [segment.end for segment in batch.segments]
        shared = model.prefill_pass(counts, placed, cache.page_size, lengths)
        x_TD, added = model.forward(batch.tokens_T, shared, cache.layers)
        self.graphs.totals.add()
        out_NV = model.empty_logits(len(rows))
        if rows:
            rows_N = to_device(torch.tensor(rows, dtype=torch.int64), model.device)
            model.logits(x_TD[rows_N], added.of_tokens(rows_N, x_TD.shape[0]), out_NV)
        return out_NV


def warm_sizes(most: int) -> list[int]:
    """Numbers of tokens, up to `most`, whose passes use every variant of the kernels; the largest first.

    Every choice by the number of tokens changes behind a power of two: linear_tile, expert_tiles, route,
    write_latents, merge_values, sort_by_expert (by rows: tokens times experts). Wide passes begin between two
    powers: the number behind the lower one still has the other products. The largest blocks of expert_tiles
    begin at a number of rows of an expert instead, so that `most` has them if any has.
    """
    powers = [1 << n for n in range(most.bit_length())]
    return sorted({most, *(size for power in powers for size in (power, power + 1) if size <= most)})[::-1]
