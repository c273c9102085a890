"""One rank's share of a pass on the Triton kernels: decode by graphs, exchanges of experts included.

Legend: B sequences of a decode step, t tokens of a shard, n those of its tokens whose logits are wanted, D
hidden, V vocabulary.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_worker.kernels.transfer import make_current, to_device
from moe_worker.kernels.triton import compiling, draw
from moe_worker.kernels.triton.expanded import SPLIT_CONTEXT
from moe_worker.kernels.triton.norm import Added, Rounding
from moe_worker.kvcache.paged import PagedCache
from moe_worker.mesh.dispatch import PlaceTable
from moe_worker.mesh.fixed import Exchanges, FixedExchange, capacity_for
from moe_worker.mesh.rank_stage import Width
from moe_worker.mesh.rebalance.hold import ReadsExperts
from moe_worker.mesh.stage_prompts import StagePrompts
from moe_worker.models.batch import Batch
from moe_worker.models.cuda import MOST_EXPANDED_BYTES, CudaModel, Rows
from moe_worker.models.cuda_build import prepare, prepare_experts
from moe_worker.models.cuda_counts import CudaExpertCounter
from moe_worker.models.cuda_graph import DecodeGraphs
from moe_worker.models.cuda_layer import Pass, Products, rounding
from moe_worker.models.cuda_prompts import Size
from moe_worker.models.cuda_runner import warm_sizes
from moe_worker.models.deepseek import DeepseekModel
from moe_worker.models.stage import Stage
from moe_worker.progress import bar

log = logging.getLogger(__name__)


class NewExperts(dict[int, tuple[Tensor, ...]]):
    """What experts of a layer have in memory (CudaLayer.expert_at), by the place that they come to."""


class CudaStage:
    """A stage on the kernels over `cache`, for shards of up to `largest` sequences of up to `context` tokens.

    model: is consumed. group: None where this rank waits to meet the others; until then it exchanges nothing.
    `resume` follows.
    """

    def __init__(
        self, model: DeepseekModel, cache: PagedCache, group: dist.ProcessGroup | None, largest: int,
        context: int, prefill_tokens: int, progress: bool = False,
    ) -> None:  # fmt: skip
        self._stage, config = model.stage, model.config
        self._top_k = config.moe.top_k
        self.hidden, self.vocabulary = config.hidden_size, config.vocab_size
        self.device, self.dtype = model.device, torch.bfloat16
        self._exchanges = Exchanges(group, model.device)
        self._ranks = self._exchanges.ranks
        self._model = prepare(model, consume=True, exchange_of=self._exchanges.of)
        self.logits_dtype = self._model.empty_logits(0).dtype
        self._cache = cache
        self._aside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._added: Added | None = None
        self.graphs = StageGraphs(self._model, cache, largest, context, self)
        self.prompts = StagePrompts(
            self._model, self.graphs, context, prefill_tokens, self, self._stage.first, self._stage.last
        )

        def shown(sizes: Iterable[int]) -> Iterable[int]:
            return bar(sizes, desc="recording CUDA graphs", unit="graph", disable=not progress)

        # Without other ranks: they may compile for longer, or not at all where this one comes back to them.
        if self.device.type == "cuda":
            sizes = warm_sizes(prefill_tokens + largest)
            with compiling.counted() as compiled, self._exchanges.muted():
                with compiling.ahead():
                    self._compute_sizes(sizes)
                self._compute_sizes(bar(sizes, desc="compiling prefill", unit="size", disable=not progress))
            log.info("%s", compiled)
            self._load_switch()
            torch.cuda.empty_cache()
        self._shown = shown

    def _compute_sizes(self, prefill: Iterable[int]) -> None:
        """Passes of every size, so that later ones find their kernels compiled."""
        for tokens in prefill:
            self._warm(tokens)
        self.graphs.compile()
        self.prompts.compile()
        if self._stage.first:  # the leader samples
            draw.warm(self.vocabulary, self.logits_dtype, self.device)

    @property
    def stage(self) -> Stage:
        """Which layers."""
        return self._stage

    @property
    def sends_int8(self) -> bool:
        """Whether activations of decode steps go to other ranks as int8 values with scales."""
        return rounding(self._model.layers[-1].gate_up, Products.GROUPS) is Rounding.INT8

    def capacity(self, tokens: int) -> int:
        """Tokens of `tokens` that a rank may send to each other one, before room is made for all."""
        return capacity_for(tokens, self._ranks, self._top_k) if self._ranks > 1 else 0

    @torch.inference_mode()
    def compute(
        self, width: Width, batch: Batch, cache: PagedCache, rows: Sequence[int], x_tD: Tensor | None
    ) -> Tensor:
        """See RankStage."""
        if cache is not self._cache:
            return self._eager(width.most, batch, cache, rows, x_tD)
        if width.decode and width.most <= self.graphs.largest:
            out = self._decode(width.most, batch, x_tD)
        else:
            most = self.prompts.tokens_for(width.most)
            size = self.prompts.size_for(width.extents)
            if size is None:
                out = self._eager(most, batch, cache, rows, x_tD)
            else:
                out = self._prompt(size, batch, rows, x_tD)
        self.graphs.totals.add()
        return out

    def expert_counter(self) -> CudaExpertCounter:
        """Counts from now on."""
        return CudaExpertCounter(self._model, self.graphs.totals)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A stream of its own, so that passes do not wait for copies from the host."""
        if self._aside is None:
            yield
            return
        make_current(self.device)  # a new thread is on the first device, and would make a context there
        with torch.cuda.stream(self._aside):
            yield
        self._aside.synchronize()

    def prepared(
        self, layer: int, before: Sequence[int], held: Sequence[int], read: ReadsExperts,
        rest: Callable[[], object],
    ) -> NewExperts:  # fmt: skip
        """See HoldsExperts. One expert after the other, and only those that come to a place: what the device
        has to copy and convert between two passes, and what it allocates, does not grow with the layer.
        """
        own, found = self._model.layers[layer - self._stage.begin], NewExperts()
        for place, (old, new) in enumerate(zip(before, held, strict=True)):
            if old == new:
                continue
            if new in before:
                found[place] = tuple(each.clone() for each in own.expert_at(before.index(new)))
            else:
                found[place] = own.fitting_expert(*prepare_experts(read([new], rest, shared=False), rest))
            if self._aside is not None:
                self._aside.synchronize()
            rest()
        return found

    @torch.inference_mode()
    def hold(self, layer: int, experts: NewExperts, table: PlaceTable) -> NewExperts:
        """See HoldsExperts. Copies on the device, since graphs hold the addresses of the ones of before."""
        self._model.layers[layer - self._stage.begin].take_experts(experts)
        if self._aside is not None:
            # What reads these places, or uses the memory of what was copied, does so after it.
            self._aside.wait_stream(torch.cuda.current_stream(self.device))
        self.place(layer, table)
        return experts

    @torch.inference_mode()
    def _load_switch(self) -> None:
        """Loads the kernels that `hold` launches, which the first switch would take 10 ms for."""
        for layer in self._model.layers[-1:]:
            layer.take_experts({0: tuple(each.clone() for each in layer.expert_at(0))})

    @torch.inference_mode()
    def place(self, layer: int, table: PlaceTable) -> None:
        """See HoldsExperts."""
        exchange = self._model.layers[layer - self._stage.begin].exchange
        if isinstance(exchange, FixedExchange):
            exchange.place(table)

    @torch.inference_mode()
    def release(self) -> None:
        """See RankStage. Drops the graphs: NCCL keeps a connection for as long as one refers to it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.graphs.forget()
        self.prompts.forget()

    def rejoin(self, group: dist.ProcessGroup) -> None:
        """See RankStage."""
        self._exchanges.rejoin(group)
        self._ranks = self._exchanges.ranks

    @torch.inference_mode()
    def resume(self) -> None:
        """See RankStage. Records the graphs."""
        self.graphs.record(self._shown)

    def exchanged(self) -> tuple[int, float]:
        """Bytes of passes outside graphs; no time is measured."""
        return self._exchanges.sent_bytes, 0.0

    def forward(self, tokens_T: Tensor, shared: Pass, cache: PagedCache, x_TD: Tensor | None) -> Tensor:
        """Runs the layers; hidden states [T, D], for the last stage not yet complete (see `finish`)."""
        self._exchanges.most.zero_()
        x_TD, self._added = self._model.forward(tokens_T, shared, cache.layers, x_TD)
        if not self._stage.last:
            self._model.settle(x_TD, self._added)
        return x_TD

    def finish(self, x_TD: Tensor, rows_n: Tensor | None, out_nV: Tensor) -> None:
        """Writes logits of the tokens at `rows_n` (None: all) of what `forward` gave."""
        added = self._added
        if added is None:
            raise ValueError("logits follow a pass")
        if rows_n is not None:
            x_TD, added = x_TD[rows_n], added.of_tokens(rows_n, x_TD.shape[0])
        self._model.logits(x_TD, added, out_nV)

    def all_have(self, own: bool) -> bool:
        """See ComputesPasses."""
        return self._exchanges.all_have(own)

    def _decode(self, most: int, batch: Batch, x_BD: Tensor | None) -> Tensor:
        graphs, count = self.graphs, len(batch.tokens)
        size = graphs.fill(batch, most)
        graphs.take_hidden(x_BD, count, size)
        capacity = self.capacity(size)
        graphs.run(size)
        if capacity < size and self._ranks > 1 and self._exchanges.overflowed(capacity):
            graphs.take_hidden(x_BD, count, size)
            graphs.run_with_room(size)
        return graphs.logits_BV[:count] if self._stage.last else graphs.x_BD[:count]

    def _prompt(self, size: Size, batch: Batch, rows: Sequence[int], x_tD: Tensor | None) -> Tensor:
        prompts, count = self.prompts, len(batch.tokens)
        prompts.take(batch, rows, size, x_tD)
        capacity = self.capacity(size.tokens)
        prompts.run(size)
        if capacity < size.tokens and self._ranks > 1 and self._exchanges.overflowed(capacity):
            prompts.take_hidden(x_tD, count, size)
            prompts.run_with_room(size)
        return self.graphs.logits_BV[: len(rows)] if self._stage.last else prompts.x_TD[:count]

    def _eager(
        self, most: int, batch: Batch, cache: PagedCache, rows: Sequence[int], x_tD: Tensor | None
    ) -> Tensor:
        shared, tokens_T = self._prefill_pass(batch, cache)
        shared = replace(shared, products=self._model.products(most))
        if x_tD is not None and not batch.segments:
            x_tD = x_tD.new_zeros(1, self.hidden)
        capacity = self.capacity(most)
        retry = self._ranks > 1 and capacity < most
        given = x_tD.clone() if retry and x_tD is not None else None
        x_TD = self.forward(tokens_T, replace(shared, capacity=capacity), cache, x_tD)
        if retry and self._exchanges.overflowed(capacity):
            x_TD = self.forward(tokens_T, replace(shared, capacity=most), cache, given)
        if not self._stage.last:
            return x_TD[: len(batch.tokens)]
        out_nV = self._model.empty_logits(len(rows))
        if rows:
            self.finish(x_TD, to_device(torch.tensor(rows, dtype=torch.int64), self.device), out_nV)
        return out_nV

    def _prefill_pass(self, batch: Batch, cache: PagedCache) -> tuple[Pass, Tensor]:
        """The pass of a batch; of one token of padding where it is empty."""
        if batch.segments:
            placed = Rows(batch.positions_T, batch.rows_T, batch.pages_BP)
            counts = [segment.size for segment in batch.segments]
            lengths = [segment.end for segment in batch.segments]
            return self._model.prefill_pass(counts, placed, cache.page_size, lengths), batch.tokens_T
        zeros_T = torch.zeros(1, dtype=torch.int64, device=self.device)
        nobody = torch.full((1, 1), cache.pages, dtype=torch.int32, device=self.device)
        placed = Rows(zeros_T, torch.full_like(zeros_T, cache.pages * cache.page_size), nobody)
        valid = torch.zeros(1, dtype=torch.int32, device=self.device)
        return self._model.decode_pass(placed, cache.page_size, valid), zeros_T

    @torch.inference_mode()
    def _warm(self, tokens: int) -> None:
        """A pass that writes to nobody's page alone, so that its kernels are compiled."""
        cache = self._cache
        zeros_T = torch.zeros(tokens, dtype=torch.int64, device=self.device)
        pages = cache.shape.pages_for(max(tokens, SPLIT_CONTEXT))
        nobody_BP = torch.full((1, pages), cache.pages, dtype=torch.int32, device=self.device)
        placed = Rows(zeros_T, torch.full_like(zeros_T, cache.pages * cache.page_size), nobody_BP)
        x_TD = None
        if not self._stage.first:
            x_TD = torch.zeros(tokens, self.hidden, dtype=self.dtype, device=self.device)
        # Attention expands the context of many tokens, in KV splits if it is long, and one that is too long
        # it does not.
        for length in (MOST_EXPANDED_BYTES, max(tokens, SPLIT_CONTEXT), tokens):
            shared = self._model.prefill_pass([tokens], placed, cache.page_size, [length])
            out_TD = self.forward(zeros_T, replace(shared, capacity=self.capacity(tokens)), cache, x_TD)
        if self._stage.last:
            rows_n = zeros_T[: self.graphs.largest]
            self.finish(out_TD, rows_n, self._model.empty_logits(rows_n.shape[0]))
        torch.cuda.synchronize()


class StageGraphs(DecodeGraphs):
    """Decode of a stage: reads hidden states from `x_BD`, unless it is the first, and leaves them there, or
    logits in `logits_BV` on the last.
    """

    # torch.distributed's own threads ask the device about other work meanwhile.
    capture_mode = "thread_local"

    def __init__(
        self, model: CudaModel, cache: PagedCache, largest: int, context: int, part: CudaStage
    ) -> None:
        super().__init__(model, cache, largest, context)
        self._part = part
        self.x_BD = torch.zeros(largest, part.hidden, dtype=part.dtype, device=part.device)
        self._with_room: dict[int, torch.cuda.CUDAGraph] = {}

    def forget(self) -> None:
        """Drops all graphs; `record` follows."""
        super().forget()
        self._with_room.clear()

    def take_hidden(self, x_BD: Tensor | None, count: int, size: int) -> None:
        """Takes in the `count` rows that the stage before computed, of a batch of `size`."""
        if x_BD is not None:
            self.x_BD[:count].copy_(x_BD)
            self.x_BD[count:size].zero_()

    def run_with_room(self, size: int) -> None:
        """As `run`, with room for all tokens in each exchange."""
        graph = self._with_room.get(size)
        if graph is None:
            self._pass(size, size)
        else:
            graph.replay()

    def _record(self, size: int, pool: Any) -> None:
        super()._record(size, pool)
        if self._part.capacity(size) < size and self._part.capacity(size):
            self._with_room[size] = self._captured(lambda: self._pass(size, size), pool)

    def _step(self, size: int) -> None:
        self._pass(size, self._part.capacity(size))

    def _pass(self, size: int, capacity: int) -> None:
        part, stage = self._part, self._part.stage
        rows = Rows(self._positions_B[:size], self._rows_B[:size], self._pages_BP[:size])
        shared = self._model.decode_pass(rows, self._cache.page_size, self._valid)
        x_BD = None if stage.first else self.x_BD[:size]
        x_BD = part.forward(self._tokens_B[:size], replace(shared, capacity=capacity), self._cache, x_BD)
        if stage.last:
            part.finish(x_BD, None, self.logits_BV[:size])
        elif stage.first:
            self.x_BD[:size].copy_(x_BD)
