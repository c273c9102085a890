"""Steps with prompts as CUDA graphs, one for each of a few sizes; smaller passes are padded.

Launched kernel by kernel such a pass takes the host 25 ms, the device 1 to 20. Tokens of padding go to no
expert, and are written to the cache's page that belongs to nobody; they read position 0 of a prompt.

Legend: T tokens, B sequences, P pages of a sequence, C tiles of tokens, N tokens whose logits are wanted.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_worker.kernels.likeliest import Likeliest
from moe_worker.kernels.transfer import Staging, to_device
from moe_worker.kernels.triton.attention import TokenTiles
from moe_worker.kernels.triton.expanded import BLOCK_T, Contexts, context_rows
from moe_worker.kernels.triton.greedy import best_tokens
from moe_worker.models.batch import Batch, Extent
from moe_worker.models.cuda import PREFILL_TOKENS, CudaModel, Rows, context_firsts, token_tiles
from moe_worker.models.cuda_graph import DecodeGraphs, captured
from moe_worker.models.cuda_layer import Pass

log = logging.getLogger(__name__)
# Prompt tokens up to which a pass is captured: the device computes larger ones for as long as the host
# launches them.
MOST_PROMPT_TOKENS = 2048
# Positions of expanded contexts in a captured pass: 0.27 GB of keys and values with 16 heads of 256 values.
MOST_EXPANDED_POSITIONS = 1 << 15
# Graphs, of about 3 MB each besides the memory that they share.
MOST_GRAPHS = 128
# Nanoseconds that launching a pass kernel by kernel takes longer than a graph.
LAUNCHES_NS = 20e6
# Contexts up to which graphs are recorded at the start; how many times as many positions as are needed a
# graph may expand before one of its own is recorded, which takes 50 ms.
USUAL_CONTEXT = 4096
MOST_SPARE = 4


class Size(NamedTuple):
    """Of a captured pass: tokens; positions of contexts that are expanded, 0 where all queries are absorbed;
    tokens at the front, each of a sequence of its own, whose queries are absorbed nevertheless.
    """

    tokens: int
    positions: int = 0
    singles: int = 0


def token_sizes(most: int) -> list[int]:
    """16 and its doubles up to 256, steps of 128 up to 512, of 256 up to 2,048 and of 1,024 above; `most`."""
    sizes = {most, 16, 32, 64, 128, 256, 384, *range(512, 2048, 256), *range(2048, most, 1024)}
    return sorted(size for size in sizes if size <= most)


def positions_for(positions: int, tokens: int) -> int:
    """A power of two, of `positions` at least, and of as many as there are tokens."""
    return 1 << (max(positions, tokens) - 1).bit_length()


def singles_for(singles: int, largest: int) -> int:
    """One of few sizes up to `largest`."""
    return next((size for size in (0, 64, 256) if singles <= size <= largest), largest)


def _covers(graph: Size, wanted: Size) -> bool:
    tokens, positions, singles = wanted
    spare = positions <= graph.positions <= positions * MOST_SPARE
    return graph.tokens == tokens and spare and singles <= graph.singles


class PromptGraphs:
    """Passes over the cache of `graphs`, with as many sequences as it has at most. Ask for the `size` of a
    batch, `fill` the buffers, then `run`; logits are in `logits_BV` of `graphs`, which also ends such passes.

    A graph is recorded at the start, or after the first pass that no recorded one fits.
    """

    def __init__(self, model: CudaModel, graphs: DecodeGraphs, context: int, prompt_tokens: int) -> None:
        device, cache, largest = model.device, graphs.cache, graphs.largest
        self._model, self._ends, self._cache, self._largest = model, graphs, cache, largest
        self._context = context
        self.sizes = token_sizes(min(prompt_tokens, MOST_PROMPT_TOKENS) + largest)
        most = self.sizes[-1]
        # Rows begin at multiples of 16 bytes, as Triton's kernels expect.
        whole = max(most, largest + 1)
        self._inputs_6T = torch.zeros(6, whole + whole % 2, dtype=torch.int64, device=device)
        self._layout_5C = torch.zeros(5, whole + -whole % 4, dtype=torch.int32, device=device)
        self._inputs, self._layout = Staging(self._inputs_6T), Staging(self._layout_5C)
        shape = largest, cache.shape.pages_for(context)
        self._pages_BP = torch.full(shape, cache.pages, dtype=torch.int32, device=device)
        self._nobody = cache.pages * cache.page_size
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        self._found: dict[Size, Likeliest | None] = {}
        self._newest: Likeliest | None = None
        self._pool = self._new_pool()
        self._open = True  # to more sizes
        self._warned = False  # of sizes that find no memory

    def _new_pool(self) -> Any:
        """The memory of graphs; None on a device without. A capture into one whose graphs are all gone
        fails for as long as torch keeps its memory.
        """
        return torch.cuda.graph_pool_handle() if self._model.device.type == "cuda" else None

    def usual_sizes(self) -> list[Size]:
        """Those of prompts without and with much context, alone and with streams; the largest first."""
        found: dict[Size, None] = {}
        for tokens in self.sizes[::-1]:
            found[Size(tokens)] = None
            most = min(tokens, singles_for(1, self._largest))
            for context in (max(tokens, min(USUAL_CONTEXT, self._context)), tokens):
                if self._model.expands([tokens], [context]):
                    positions = positions_for(context, tokens)
                    found |= dict.fromkeys((Size(tokens, positions, most), Size(tokens, positions)))
        return list(found)

    @torch.inference_mode()
    def compile(self) -> None:
        """Computes each usual size once, so that passes find their kernels compiled."""
        for size in self.usual_sizes():
            self._fill_nothing(size)
            self._step(size)
        torch.cuda.synchronize()

    @torch.inference_mode()
    def record(self, each: Callable[[Iterable[Size]], Iterable[Size]] = lambda sizes: sizes) -> None:
        """Compiles the kernels of the usual sizes and records their graphs, as far as memory allows.

        each: wraps the sizes, for a progress bar.
        """
        if self._pool is None:
            return
        begin, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        for size in each(self.usual_sizes()):
            self._open = len(self._graphs) < MOST_GRAPHS  # smaller ones fit where one did not
            self._fill_nothing(size)
            try:
                self.run(size)
            except torch.OutOfMemoryError as error:
                self._close(error)
        taken, seconds = free - torch.cuda.mem_get_info()[0], time.monotonic() - begin
        log.info(
            "%d CUDA graphs of prompts take %.2f GB, after %.1f s", len(self._graphs), taken / 1e9, seconds
        )

    def _fill_nothing(self, size: Size) -> None:
        self.fill(Batch.of([], self._cache), [], size)

    def size(self, batch: Batch, rows: Sequence[int]) -> Size | None:
        """That of a pass over `batch` with logits of `rows`; None if there is no graph for it."""
        segments = batch.segments
        counts, lengths = [each.size for each in segments], [each.end for each in segments]
        return self.size_for([Extent(counts, lengths, batch.decodes, len(rows))])

    def size_for(self, extents: Sequence[Extent]) -> Size | None:
        """One that fits each of these batches; None if there is no graph for them."""
        tokens = max(sum(each.counts) for each in extents)
        sequences = max(max(len(each.counts), each.rows) for each in extents)
        if tokens > self.sizes[-1] or sequences > self._largest:
            return None
        absorbed = size = Size(self.sizes[bisect_left(self.sizes, tokens)])
        saved_ns = max(
            self._model.saved_by_expanding(counts[singles:], lengths[singles:], lengths[:singles])
            for counts, lengths, singles, _ in extents
        )
        if saved_ns > 0:
            positions = max(sum(each.lengths[each.singles :]) for each in extents)
            positions = positions_for(positions, size.tokens)
            singles = max(each.singles for each in extents)
            size = Size(size.tokens, positions, min(size.tokens, singles_for(singles, self._largest)))
            if positions > MOST_EXPANDED_POSITIONS:
                return None
        fits = [each for each in self._graphs if _covers(each, size)]
        if fits or self._open:
            return min(fits, default=size)
        return absorbed if absorbed in self._graphs and saved_ns < LAUNCHES_NS else None

    def fill(self, batch: Batch, rows: Sequence[int], size: Size) -> None:
        """Takes in a batch."""
        count, sequences = len(batch.tokens), len(batch.segments)
        tokens_T, positions_T, rows_T, wanted_N, single_positions_B, single_rows_B = self._inputs.buffer()
        tokens_T[:count], tokens_T[count:] = batch.tokens, 0
        positions_T[:count], positions_T[count:] = batch.positions, 0
        rows_T[:count], rows_T[count:] = batch.rows, self._nobody
        wanted_N[: len(rows)], wanted_N[len(rows) :] = rows, 0
        skipped = batch.decodes if size.positions else 0
        single_positions_B[:skipped], single_positions_B[skipped:] = batch.positions[:skipped], 0
        single_rows_B[:skipped], single_rows_B[skipped:] = batch.rows[:skipped], self._nobody
        self._inputs.copy()
        for fed in batch.fed:
            fed.copy(self._inputs_6T[0])
        counts = [segment.size for segment in batch.segments]
        lengths = [segment.end for segment in batch.segments]
        tiles_3C = token_tiles([*counts, size.tokens - count], self._tile(size), skipped)
        tiles_3C[0, tiles_3C[0] == sequences] = skipped
        layout_5C = self._layout.buffer()
        layout_5C[:3] = 0
        layout_5C[:3, : tiles_3C.shape[1]] = tiles_3C
        firsts = context_firsts(lengths, skipped)
        layout_5C[3, : len(firsts)], layout_5C[3, len(firsts) :] = firsts, firsts[-1]
        layout_5C[4, 0] = count
        self._layout.copy()
        if sequences:
            pages_BP = to_device(torch.from_numpy(batch.pages), self._pages_BP.device)
            self._pages_BP[:sequences, : pages_BP.shape[1]].copy_(pages_BP)

    def run(self, size: Size) -> None:
        """The pass that `fill` has taken in."""
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
            self._newest = self._found[size]
            return
        self._newest = self._step(size)
        if self._pool is not None and self._open:
            self._capture(size)
            self._open = self._open and len(self._graphs) < MOST_GRAPHS

    def likeliest(self, count: int) -> Likeliest | None:
        """Of the first `count` rows, by the newest pass; valid until the next one."""
        return self._newest and Likeliest(*(each_B[:count] for each_B in self._newest))

    def _capture(self, size: Size) -> None:
        found: list[Likeliest | None] = []
        try:
            # Other threads may use the device meanwhile.
            graph = captured(lambda: found.append(self._step(size)), self._pool, "thread_local")
        except RuntimeError as error:  # also where memory is too short
            self._close(error)
            return
        self._graphs[size], self._found[size] = graph, found[0]

    def _close(self, error: Exception) -> None:
        if not self._warned:
            log.warning("some steps with prompts are launched kernel by kernel, without a graph: %s", error)
        self._open, self._warned = False, True

    def _tile(self, size: Size) -> int:
        return BLOCK_T if size.positions else PREFILL_TOKENS

    def _step(self, size: Size) -> Likeliest | None:
        model, cache, tokens, most = self._model, self._cache, size.tokens, self._tile(size)
        ids_T, positions_T, rows_T = (each[:tokens] for each in self._inputs_6T[:3])
        tiles = min(tokens, tokens // most + self._largest + 1)
        sequence_C, first_C, count_C = (each[:tiles] for each in self._layout_5C[:3])
        rows, valid = Rows(positions_T, rows_T, self._pages_BP), self._layout_5C[4, :1]
        cut, page = TokenTiles(sequence_C, first_C, count_C, most), cache.page_size
        if size.positions:
            first_B = self._layout_5C[3, : self._largest + 1]
            rows_C = context_rows(rows.pages_BP, first_B, size.positions, page, self._nobody)
            contexts = Contexts(rows_C, first_B, cut)
            shared = model.expanded_pass(rows, contexts, page, valid, self._singles(size.singles))
        else:
            shared = model.absorbed_pass(rows, cut, page, valid)
        self._compute(ids_T, shared, size)
        return self._end()

    @property
    def _wanted_N(self) -> Tensor:  # noqa: N802 - a tensor's name contains its shape
        return self._inputs_6T[3, : self._largest]

    def _compute(self, ids_T: Tensor, shared: Pass, size: Size) -> None:
        """Leaves logits of the wanted tokens."""
        x_TD, added = self._model.forward(ids_T, shared, self._cache.layers)
        wanted_N = self._wanted_N
        self._model.logits(x_TD[wanted_N], added.of_tokens(wanted_N, size.tokens), self._ends.logits_BV)

    def _end(self) -> Likeliest | None:
        self._ends.totals.add()
        return Likeliest(*best_tokens(self._ends.logits_BV))

    def _singles(self, count: int) -> Pass | None:
        if not count:
            return None
        rows = Rows(self._inputs_6T[4, :count], self._inputs_6T[5, :count], self._pages_BP[:count])
        return self._model.decode_pass(rows, self._cache.page_size)
