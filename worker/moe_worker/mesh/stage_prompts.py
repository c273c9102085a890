"""Steps with prompts of a rank as CUDA graphs, exchanges of experts included.

NCCL wants an operation captured on all ranks, in graphs that all of them launch, or on none. So all ranks
choose the size of a pass by the batches of all shards, which each knows, and record its graph after the first
pass of that size. Where one of them cannot, none keeps its graph.

Legend: t tokens of a shard, D hidden.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.cuda import CudaModel
from moe_worker.models.cuda_graph import DecodeGraphs
from moe_worker.models.cuda_layer import Pass
from moe_worker.models.cuda_prompts import PromptGraphs, Size


class ComputesPasses(Protocol):
    """The stage whose passes these are (CudaStage)."""

    hidden: int
    dtype: torch.dtype

    def capacity(self, tokens: int) -> int:
        """Tokens of `tokens` that a rank may send to each other one."""
        ...

    def forward(self, tokens_T: Tensor, shared: Pass, cache: PagedCache, x_TD: Tensor | None) -> Tensor:
        """Hidden states [T, D] behind the layers."""
        ...

    def finish(self, x_TD: Tensor, rows_n: Tensor | None, out_nV: Tensor) -> None:
        """Writes logits of the tokens at `rows_n`."""
        ...

    def all_have(self, own: bool) -> bool:
        """Whether `own` is true on all ranks of the stage, which call this together."""
        ...


class StagePrompts(PromptGraphs):
    """Passes of a stage over the cache of `graphs`. They read hidden states from `x_TD`, unless the stage is
    the first, and leave them there, or logits in `logits_BV` of `graphs` on the last.
    """

    def __init__(
        self, model: CudaModel, graphs: DecodeGraphs, context: int, prompt_tokens: int, part: ComputesPasses,
        first: bool, last: bool,
    ) -> None:  # fmt: skip
        super().__init__(model, graphs, context, prompt_tokens)
        self._part, self._first, self._last, self._roomy = part, first, last, False
        self.x_TD = torch.zeros(self.sizes[-1], part.hidden, dtype=part.dtype, device=model.device)

    def tokens_for(self, most: int) -> int:
        """Tokens of the passes of all ranks where the largest shard has `most`."""
        return most if most > self.sizes[-1] else self.sizes[bisect_left(self.sizes, most)]

    def take(self, batch: Batch, rows: Sequence[int], size: Size, x_tD: Tensor | None) -> None:
        """Takes in a batch and what the stage before computed."""
        self.fill(batch, rows, size)
        self.take_hidden(x_tD, len(batch.tokens), size)

    def take_hidden(self, x_tD: Tensor | None, count: int, size: Size) -> None:
        """Takes in the `count` rows that the stage before computed."""
        if x_tD is not None:
            self.x_TD[:count].copy_(x_tD[:count])
            self.x_TD[count : size.tokens].zero_()

    def run_with_room(self, size: Size) -> None:
        """As `run`, with room for all tokens in each exchange; never a graph, since that is rare."""
        self._roomy = True
        try:
            self._step(size)
        finally:
            self._roomy = False

    def forget(self) -> None:
        """Drops all graphs; passes record new ones."""
        self._graphs.clear()
        self._found.clear()
        self._newest, self._open, self._pool = None, True, self._new_pool()

    def _capture(self, size: Size) -> None:
        super()._capture(size)
        if not self._part.all_have(size in self._graphs):
            self._graphs.pop(size, None)
            self._found.pop(size, None)
            self._open = False

    def _compute(self, ids_T: Tensor, shared: Pass, size: Size) -> None:
        part, tokens = self._part, size.tokens
        shared = replace(shared, capacity=tokens if self._roomy else part.capacity(tokens))
        x_TD = part.forward(ids_T, shared, self._cache, None if self._first else self.x_TD[:tokens])
        if self._last:
            part.finish(x_TD, self._wanted_N, self._ends.logits_BV)
        elif self._first:
            self.x_TD[:tokens].copy_(x_TD)

    def _end(self) -> None:
        """The leader samples, and the stage counts passes itself."""
