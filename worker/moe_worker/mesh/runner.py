"""Runs passes over a mesh: the leader says what is computed, every rank computes its part.

A segment belongs to a shard: the rank with that number in each stage computes its attention and keeps its
pages. Hidden states go from stage to stage between the ranks of one shard, logits from the last stage to the
leader. All ranks of a stage enter each exchange of experts together, those without tokens too.

Legend: t tokens of a shard, N tokens whose logits are wanted, n those of a shard, D hidden, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from moe_worker.kvcache.paged import PagedCache
from moe_worker.mesh.control import Allocate, AskCounts, Compute, Counts, Piece, Ready
from moe_worker.mesh.dispatch import AllToAllDispatch
from moe_worker.mesh.exchange import receive, send
from moe_worker.mesh.member import Member
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.layers import StageModel
from moe_worker.moe.counting import Counter


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
    """One rank's stage. On the leader a Runner; the others `follow` it."""

    def __init__(self, member: Member, model: StageModel, cache: PagedCache) -> None:
        self._member, self._model, self._cache = member, model, cache
        self._last = member.shape.pipeline - 1
        self._counter = model.expert_counter()

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """[N, V] float32, of the whole mesh; only the leader calls it. Raises MeshError."""
        scratch = 0 if cache is self._cache else cache.pages
        step = Compute(_pieces(batch, rows), scratch)
        for channel in self._member.channels:
            channel.send(step)
        own_nV = self._compute(step, cache)
        return self._collect(step, own_nV)

    def expert_counter(self) -> "MeshCounter":
        """Of all ranks."""
        return MeshCounter(self._member, self._counter)

    def exchanged(self) -> tuple[int, float]:
        """Bytes that this rank sent to others for experts, and seconds in exchanges, since the start."""
        dispatches = [
            each for each in self._model.stage.dispatches.values() if isinstance(each, AllToAllDispatch)
        ]
        return sum(each.sent_bytes for each in dispatches), sum(each.seconds for each in dispatches)

    @torch.inference_mode()
    def follow(self) -> NoReturn:
        """Computes what the leader says, until it is gone. Raises MeshError then."""
        channel = self._member.channels[0]
        while True:
            message = channel.receive(Compute, AskCounts)
            if isinstance(message, AskCounts):
                passes, layers = self._counter.read()
                channel.send(Counts(passes, tuple((layer, tuple(own), n) for layer, own, n in layers)))
                continue
            cache = self._scratch(message.scratch) if message.scratch else self._cache
            out_nV = self._compute(message, cache)
            if out_nV is not None and out_nV.shape[0]:
                send(out_nV, 0)

    def _own(self, step: Compute) -> list[Piece]:
        return [piece for piece in step.pieces if piece.shard == self._member.place]

    def _compute(self, step: Compute, cache: PagedCache) -> Tensor | None:
        """This rank's part of a pass; on the last stage, logits [n, V] of its shard."""
        member, model = self._member, self._model
        pieces, dim = self._own(step), model.config.hidden_size
        batch = Batch.of([Segment(p.tokens, p.start, p.pages, p.shard) for p in pieces], cache)
        tokens, each = batch.tokens_T.shape[0], member.shape.expert
        x_tD = None
        if member.number:
            x_tD = torch.empty(tokens, dim, dtype=model.dtype, device=model.device)
            if tokens:
                receive(x_tD, member.rank - each)
        x_tD = model.forward(batch, cache, x_tD)
        if cache is self._cache:
            self._counter.count(tokens)
        if member.number < self._last:
            if tokens:
                send(x_tD, member.rank + each)
            return None
        return model.logits(x_tD[_selected(pieces, model.device)])

    def _collect(self, step: Compute, own_nV: Tensor | None) -> Tensor:
        """All logits, in the order of the pieces."""
        model, first = self._model, self._last * self._member.shape.expert
        shards = [piece.shard for piece in step.pieces for _ in piece.selected]
        shape = len(shards), model.config.vocab_size
        out_NV = torch.empty(shape, dtype=torch.float32, device=model.device)
        shard_N = torch.tensor(shards, dtype=torch.int64, device=model.device)
        for shard in sorted(set(shards)):
            part_nV = own_nV
            if first + shard != self._member.rank or part_nV is None:
                part_nV = out_NV.new_empty(shards.count(shard), shape[1])
                receive(part_nV, first + shard)
            out_NV[shard_N == shard] = part_nV
        return out_NV

    def _scratch(self, pages: int) -> PagedCache:
        return PagedCache.allocate(self._cache.shape, pages, self._cache.device)


class MeshCounter:
    """Counts the experts of all ranks from now on. An expert is active once for each shard that uses it."""

    def __init__(self, member: Member, own: Counter) -> None:
        self._member, self._own, self._passes = member, own, 0
        self._before = self._sums()

    def count(self, tokens: int) -> None:
        """Takes in a pass; the ranks have counted its experts."""
        del tokens
        self._passes += 1

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """Passes so far, and for each layer its number, the tokens of each expert, and its active experts."""
        rows = []
        for layer, sums in sorted(self._sums().items()):
            before = self._before.get(layer, [0] * len(sums))
            *tokens, active = (now - then for now, then in zip(sums, before, strict=True))
            rows.append((layer, tokens, active))
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
    """`rows`, which rise, cut by segments; tokens are the batch's, which knows those of the step before."""
    tokens = batch.tokens_T.tolist()
    pieces, first, wanted = [], 0, deque(rows)
    for segment in batch.segments:
        end, selected = first + segment.count, []
        while wanted and wanted[0] < end:
            selected.append(wanted.popleft() - first)
        own = tuple(tokens[first:end])
        pieces.append(Piece(own, segment.start, tuple(segment.pages), segment.shard, tuple(selected)))
        first = end
    return tuple(pieces)


def _selected(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    """Rows of a shard's batch whose logits are wanted."""
    rows, first = [], 0
    for piece in pieces:
        rows += [first + row for row in piece.selected]
        first += len(piece.tokens)
    return torch.tensor(rows, dtype=torch.int64, device=device)
