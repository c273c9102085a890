"""Runs passes over a mesh: the leader says what is computed, every rank computes its part.

A segment belongs to a shard: the rank with that number in each stage computes its attention and keeps its
pages. Hidden states go from stage to stage between the ranks of one shard, logits from the last stage to the
leader. All ranks of a stage enter each exchange of experts together, those without tokens too.

Legend: t tokens of a shard, N tokens whose logits are wanted, n those of a shard, D hidden, V vocabulary.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_worker.kernels.transfer import to_device
from moe_worker.kvcache.paged import PagedCache
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.exchange import receive, send
from moe_worker.mesh.member import Member
from moe_worker.mesh.messages import Allocate, AskCounts, Compute, Counts, End, Piece, Ready
from moe_worker.mesh.rank_stage import RankStage, Width
from moe_worker.models.batch import Batch, Segment
from moe_worker.moe.counting import Counter

log = logging.getLogger(__name__)
# A lost rank has so long to come back, and so many may be lost in a while; then the replica ends.
REFORM_S, REFORM_PAUSE_S = 120.0, 0.2
MOST_REFORMS, REFORM_WINDOW_S = 5, 600.0


def agree_on_pages(member: Member, pages: int) -> int:
    """The pages that every rank has room for; returns when all ranks have loaded their weights."""
    if member.leads:
        most: int = min([pages, *(channel.receive(Ready).pages for channel in member.channels)])
        for channel in member.channels:
            channel.send(Allocate(most))
        return most
    member.channels[0].send(Ready(pages))
    allotted: int = member.channels[0].receive(Allocate).pages
    return allotted


class MeshRunner:
    """One rank's stage. On the leader a Runner; the others `follow` it.

    feeds: whether ranks get sampled tokens from the leader's device, so that a step may be launched before
    the host knows its tokens.
    """

    def __init__(self, member: Member, part: RankStage, cache: PagedCache, feeds: bool = False) -> None:
        self._member, self._part, self._cache, self.feeds = member, part, cache, feeds
        self._last = member.shape.pipeline - 1
        self._counter = part.expert_counter()
        self._counters: list[MeshCounter] = []
        self._fed_N: Tensor | None = None
        self._reformed: list[float] = []
        member.arm()

    def reform(self, error: MeshError) -> None:
        """Meets the other ranks again after `error`; all but lost ones keep their weights, none its cache.

        Raises MeshError where that fails, or has happened MOST_REFORMS times in REFORM_WINDOW_S already.
        """
        while True:
            now = time.monotonic()
            self._reformed = [*(each for each in self._reformed if now - each < REFORM_WINDOW_S), now]
            if len(self._reformed) > MOST_REFORMS or self._part.device.type == "cuda":
                raise error
            log.warning("rank %d meets the others again: %s", self._member.rank, error)
            try:
                self._member.reform(REFORM_S)
                self._agree()
            except MeshError as again:
                error = again
                time.sleep(min(REFORM_PAUSE_S * len(self._reformed), REFORM_S))
                continue
            self._part.rejoin(self._member.stage_group)
            self._member.arm()
            for counter in self._counters:
                counter.rebase()
            took = time.monotonic() - now
            log.warning(
                "mesh %s has formed again (%d) in %.2f s", self._member.shape, self._member.formation, took
            )
            return

    def _agree(self) -> None:
        """A rank that is new must have room for as many pages as the others have allocated."""
        pages = self._cache.pages
        if agree_on_pages(self._member, pages) != pages:
            raise MeshError(f"a new rank has no room for {pages} pages of KV cache; start all ranks again")

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """[N, V], of the whole mesh; only the leader calls it. Raises MeshError."""
        scratch = 0 if cache is self._cache else cache.pages
        step = Compute(_pieces(batch, rows), scratch, self.feeds and not scratch and bool(rows))
        for channel in self._member.channels:
            channel.send(step)
        return self._collect(step, self._compute(step, cache))

    def feed(self, tokens_N: Tensor) -> None:
        """The tokens sampled from the newest logits; called after each of them where `feeds`."""
        self._fed_N = tokens_N
        for rank in self._member.shape.stage_ranks(0)[1:]:
            send(tokens_N, rank)

    def expert_counter(self) -> "MeshCounter":
        """Of all ranks."""
        counter = MeshCounter(self._member, self._counter)
        self._counters.append(counter)
        return counter

    def exchanged(self) -> tuple[int, float]:
        """Bytes that this rank sent to others for experts, and seconds in exchanges, since the start."""
        return self._part.exchanged()

    @torch.inference_mode()
    def follow(self) -> None:
        """Computes what the leader says, until it says that this was all. Raises MeshError if it is gone."""
        channel = self._member.channels[0]
        while not isinstance(message := channel.receive(Compute, AskCounts, End), End):
            if isinstance(message, AskCounts):
                passes, layers = self._counter.read()
                channel.send(Counts(passes, tuple((layer, tuple(own), n) for layer, own, n in layers)))
                continue
            cache = self._scratch(message.scratch) if message.scratch else self._cache
            out_nV = self._compute(message, cache)
            if out_nV is not None and out_nV.shape[0]:
                send(out_nV, 0)
            if message.feeds and self._member.number == 0:
                count = sum(len(piece.selected) for piece in message.pieces)
                fed_N = torch.empty(count, dtype=torch.int64, device=self._part.device)
                self._fed_N = receive(fed_N, 0)
        self._member.quiet()

    def _compute(self, step: Compute, cache: PagedCache) -> Tensor | None:
        """This rank's part of a pass; on the last stage, logits [n, V] of its shard."""
        member, part = self._member, self._part
        pieces = [piece for piece in step.pieces if piece.shard == member.place]
        batch = Batch.of([Segment(p.tokens, p.start, p.pages, p.shard) for p in pieces], cache)
        if member.number == 0:
            self._fill_in(pieces, batch)
        tokens, each = batch.tokens_T.shape[0], member.shape.expert
        x_tD = None
        if member.number:
            x_tD = torch.empty(tokens, part.hidden, dtype=part.dtype, device=part.device)
            if tokens:
                receive(x_tD, member.rank - each)
        out = part.compute(_width(step.pieces, member.shape.expert), batch, cache, _selected(pieces), x_tD)
        if cache is self._cache:
            self._counter.count(tokens)
        if member.number == self._last:
            return out
        if tokens:
            send(out, member.rank + each)
        return None

    def _fill_in(self, pieces: Sequence[Piece], batch: Batch) -> None:
        """Inserts tokens that the host does not know yet, from the step before, on the device."""
        unknown = [
            (row, piece.source)
            for row, piece in zip(batch.last_rows, pieces, strict=True)
            if piece.source >= 0
        ]
        if unknown and self._fed_N is not None:
            rows_n, sources_n = (
                to_device(torch.tensor(each), self._part.device) for each in zip(*unknown, strict=True)
            )
            batch.tokens_T.index_copy_(0, rows_n, self._fed_N[sources_n])

    def _collect(self, step: Compute, own_nV: Tensor | None) -> Tensor:
        """All logits, in the order of the pieces."""
        part, first = self._part, self._last * self._member.shape.expert
        shards = [piece.shard for piece in step.pieces for _ in piece.selected]
        if own_nV is not None and own_nV.shape[0] == len(shards):
            return own_nV
        shape = len(shards), part.vocabulary
        out_NV = torch.empty(shape, dtype=part.logits_dtype, device=part.device)
        for shard in sorted(set(shards)):
            rows = [row for row, each in enumerate(shards) if each == shard]
            rows_n = to_device(torch.tensor(rows, dtype=torch.int64), part.device)
            part_nV = own_nV
            if first + shard != self._member.rank or part_nV is None:
                part_nV = out_NV.new_empty(len(rows), shape[1])
                receive(part_nV, first + shard)
            out_NV.index_copy_(0, rows_n, part_nV)
        return out_NV

    def _scratch(self, pages: int) -> PagedCache:
        return PagedCache.allocate(self._cache.shape, pages, self._cache.device)


class MeshCounter:
    """Counts the experts of all ranks from now on. An expert is active once for each shard that uses it."""

    def __init__(self, member: Member, own: Counter) -> None:
        self._member, self._own, self._passes = member, own, 0
        self._before = self._sums()
        self._kept: dict[int, list[int]] = {}
        self._base: dict[int, list[int]] = {}

    def rebase(self) -> None:
        """Goes on from what was read last; a new rank counts from 0."""
        self._base = dict(self._kept)
        self._before = self._sums()

    def count(self, tokens: int) -> None:
        """Takes in a pass; the ranks have counted its experts."""
        del tokens
        self._passes += 1

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """Passes so far, and for each layer its number, the tokens of each expert, and its active experts."""
        rows = []
        for layer, sums in sorted(self._sums().items()):
            before, base = (each.get(layer, [0] * len(sums)) for each in (self._before, self._base))
            found = [now - then + kept for now, then, kept in zip(sums, before, base, strict=True)]
            self._kept[layer] = found
            rows.append((layer, found[:-1], found[-1]))
        return self._passes, rows

    def _sums(self) -> dict[int, list[int]]:
        """By layer over all ranks: the tokens of each expert, and behind them its active experts."""
        layers = [(layer, [*tokens, active]) for layer, tokens, active in self._own.read()[1]]
        for channel in self._member.channels:
            channel.send(AskCounts())
            counts = channel.receive(Counts)
            layers += [(layer, [*tokens, active]) for layer, tokens, active in counts.layers]
        sums: dict[int, list[int]] = {}
        for layer, row in layers:
            sums[layer] = [a + b for a, b in zip(sums.get(layer, [0] * len(row)), row, strict=True)]
        return sums


def _pieces(batch: Batch, rows: Sequence[int]) -> tuple[Piece, ...]:
    """`rows`, which rise, cut by segments."""
    pieces, first, wanted = [], 0, deque(rows)
    for segment in batch.segments:
        end, selected = first + segment.count, []
        while wanted and wanted[0] < end:
            selected.append(wanted.popleft() - first)
        own = tuple(max(0, token) for token in segment.tokens)  # one that is not known yet is filled in later
        pages = tuple(segment.pages)
        pieces.append(Piece(own, segment.start, pages, segment.shard, tuple(selected), segment.source))
        first = end
    return tuple(pieces)


def _width(pieces: Sequence[Piece], shards: int) -> Width:
    tokens = [0] * shards
    for piece in pieces:
        tokens[piece.shard] += len(piece.tokens)
    decode = all(len(piece.tokens) == len(piece.selected) == 1 for piece in pieces)
    return Width(max(tokens), decode)


def _selected(pieces: Sequence[Piece]) -> list[int]:
    """Rows of a shard's batch whose logits are wanted."""
    rows, first = [], 0
    for piece in pieces:
        rows += [first + row for row in piece.selected]
        first += len(piece.tokens)
    return rows
