"""Runs passes over a mesh: the leader says what is computed, every rank computes its part.

A segment belongs to a shard: the rank with that number in each stage computes its attention and keeps its
pages. Hidden states go from stage to stage between the ranks of one shard. The last stage draws tokens, which
go to the leader; where that takes more than a Draw says, logits do. All ranks of a stage enter each exchange
of experts together, those without tokens too. Nobody waits until another stage has received, so that the
stages of a pipeline compute different passes.

Legend: t tokens of a shard, N rows of logits, n wanted rows of a shard, D tokens drawn, V vocabulary.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, zip_longest

import torch
from torch import Tensor

from moe_worker.kernels.transfer import to_device
from moe_worker.kvcache.paged import PagedCache
from moe_worker.mesh.errors import MeetAgainError, MeshError, RankLostError, RankMemoryError
from moe_worker.mesh.exchange import Early, Outbox, receive, send
from moe_worker.mesh.member import Member
from moe_worker.mesh.messages import (
    Again,
    AskCounts,
    Compute,
    Counts,
    End,
    Feed,
    Piece,
    Prepare,
    Switch,
)
from moe_worker.mesh.rank_stage import RankStage, Width
from moe_worker.mesh.rebalance.execute import Rebalancing
from moe_worker.mesh.rebalance.hold import HeldExperts
from moe_worker.mesh.recovery import MOST_REFORMS, Recovery, whole_columns
from moe_worker.mesh.results import PassResult, Wanted, checked, drawn
from moe_worker.models.batch import Batch, Extent, Fed, Segment
from moe_worker.models.memory import lack_of_memory
from moe_worker.moe.counting import Counter
from moe_worker.sampling.drawer import Drawer
from moe_worker.sampling.remote import Draw

# Samples of steps that may be fed to later ones.
MOST_FED = 8


class MeshRunner:
    """One rank's stage. On the leader a Runner; the others `follow` it.

    feeds: whether ranks get sampled tokens from the leader's device, so that a step may be launched before
    the host knows its tokens; without, the last stage may draw. held: the experts of this rank, where they
    may change. reforms: how often in 10 minutes ranks may be lost. rebalancing: the leader's, which `tend`
    advances.
    """

    def __init__(
        self, member: Member, part: RankStage, cache: PagedCache, feeds: bool = False,
        held: HeldExperts | None = None, reforms: int = MOST_REFORMS,
    ) -> None:  # fmt: skip
        self.member, self._part, self._cache, self.feeds = member, part, cache, feeds
        self._held = held
        self.rebalancing: Rebalancing | None = None
        self._last = member.shape.pipeline - 1
        self._counter = part.expert_counter()
        self._counters: list[MeshCounter] = []
        self._fed: deque[Tensor] = deque(maxlen=MOST_FED)
        self._early, self._outbox = Early(part.device), Outbox(2 * member.shape.pipeline)
        self._begun: deque[tuple[Compute, PassResult | None]] = deque()
        self._drawer = Drawer(part.vocabulary, part.device)
        self._collected_bytes = 0
        # Where the sequences of a shard are: the ranks with this number in each stage.
        self._homes = list(range(member.shape.expert))
        self._recovery = Recovery(member, part, held, cache.pages, self._met_again, reforms)
        member.arm()

    def reform(self, error: MeshError) -> None:
        """Meets the other ranks again after `error`. Raises MeshError."""
        self._forget()
        self._recovery.recover(error)

    def _forget(self) -> None:
        """What is under way between ranks."""
        self._outbox.forget()
        self._fed.clear()
        self._begun.clear()

    @property
    def shards(self) -> Sequence[int]:
        """Those to which new sequences may go: one for each shard that is whole."""
        return sorted({column: shard for shard, column in reversed([*enumerate(self._homes)])}.values())

    def direct(self, rebalancing: Rebalancing) -> None:
        """For the leader, which moves experts, and serves without ranks whose experts others have."""
        self.rebalancing, self._recovery.stages = rebalancing, rebalancing.stages

    def _take_in(self, returned: Sequence[int]) -> None:
        """All others keep their cache. Raises MeshError where one of them is another process now."""
        before = self.member.processes
        self.member.call_together()
        self._forget()
        self._recovery.recover(MeetAgainError(f"ranks {returned} are back"))
        after = self.member.processes
        for rank, process in before.items():
            if after.get(rank) != process:
                raise RankLostError(f"rank {rank} was lost when others came back")

    def _met_again(self) -> None:
        if not self.member.leads:
            return
        self._rehome()
        if self.rebalancing is not None:
            self.rebalancing.abandon()
        for counter in self._counters:
            counter.rebase()

    def _rehome(self) -> None:
        """Sequences of shards that are not whole any more go to others; those that are again get new ones."""
        whole = whole_columns(self.member.shape, self.member.absent)
        self._homes = [
            column if column in whole else whole[shard % len(whole)]
            for shard, column in enumerate(self._homes)
        ]
        self._homes += [column for column in whole if column not in self._homes]

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """[N, V], of the whole mesh; only the leader calls it. Raises MeshError."""
        return self.begin(batch, cache, rows)().logits_NV

    def begin(
        self, batch: Batch, cache: PagedCache, rows: Sequence[int], draws: Sequence[Draw | None] = ()
    ) -> Callable[[], PassResult]:
        """Computes the leader's part of a pass; what it returns waits for the result of the last stage.

        rows: of the batch, that are wanted, rising. draws: of each segment, for the last of its rows; none:
        all logits are kept. Results are collected in the order in which passes began. Both raise MeshError.
        """
        scratch = 0 if cache is self._cache else cache.pages
        step = Compute(_pieces(batch, rows, self._homes, draws), scratch)
        with self._explained(step):
            for channel in self.member.channels:
                channel.send(step)
            self._begun.append((step, self._compute(step, cache)))
        return self._collect_oldest

    def discard(self) -> None:
        """Collects what was begun, so that the next pass gets its own logits. Raises MeshError."""
        while self._begun:
            self._collect_oldest()

    def feed(self, tokens_N: Tensor) -> None:
        """The tokens sampled from the logits collected last; called after each of them where `feeds`."""
        self._fed.append(tokens_N)
        first = self.member.shape.stage_ranks(0)
        for channel in self.member.channels:
            if channel.rank in first:
                channel.send(Feed(tokens_N.shape[0]))
                send(tokens_N, self.member.index(channel.rank))

    def expert_counter(self) -> "MeshCounter":
        """Of all ranks."""
        counter = MeshCounter(self.member, self._counter)
        self._counters.append(counter)
        return counter

    def exchanged(self) -> tuple[int, float]:
        """Bytes that this rank sent to others for experts, and seconds in exchanges, since the start."""
        return self._part.exchanged()

    def passed_on(self) -> tuple[int, int]:
        """Bytes that the leader sent to the next stage and received from the last one, since the start."""
        return self._outbox.sent_bytes, self._collected_bytes

    def tend(self) -> None:
        """Between two passes: takes ranks in that have returned, and moves experts. Only the leader calls it.

        Raises MeshError, also where a rank is lost.
        """
        if self.member.lost is not None:
            raise self.member.lost
        if self.member.returned:
            self._take_in(sorted(self.member.returned))
        if self.rebalancing is not None:
            with self.member.explained():
                self.rebalancing.tend()

    @torch.inference_mode()
    def follow(self) -> None:
        """Computes what the leader says, until it says that this was all. Raises MeshError if it is gone."""
        channel = self.member.channels[0]
        kinds = Compute, Feed, AskCounts, Prepare, Switch, Again, End
        while not isinstance(message := channel.receive(*kinds), End):
            if isinstance(message, Again):
                raise MeetAgainError("the leader calls all ranks together")
            if isinstance(message, Prepare | Switch):
                if self._held is None:
                    raise MeshError(f"the experts of rank {self.member.rank} stay where they are")
                self._held.take(message)
                continue
            if isinstance(message, AskCounts):
                passes, layers = self._counter.read()
                channel.send(Counts(passes, tuple((layer, tuple(own), n) for layer, own, n in layers)))
                continue
            if isinstance(message, Feed):
                fed_N = torch.empty(message.count, dtype=torch.int64, device=self._part.device)
                self._fed.append(receive(fed_N, self.member.index(0)))
                continue
            self._follow_step(message)
        self.member.quiet()

    def _follow_step(self, step: Compute) -> None:
        """Raises MeshError, where this rank has no memory for it after the leader has taken note."""
        try:
            with self._explained(step):
                cache = self._scratch(step.scratch) if step.scratch else self._cache
                result = self._compute(step, cache)
                for part in () if result is None else (result.tokens_D, result.logits_NV):
                    if part.shape[0]:
                        self._outbox.send(part, self.member.index(0), self.member.back)
        except RankMemoryError as error:
            self.member.channels[0].fail(str(error), error.tokens)
            raise

    @contextlib.contextmanager
    def _explained(self, step: Compute) -> Iterator[None]:
        """Raises RankMemoryError where this rank has no memory for `step`, or another one has said so."""
        try:
            with self.member.explained(), lack_of_memory():
                yield
        except torch.OutOfMemoryError as error:
            tokens = sum(len(piece.tokens) for piece in step.pieces)
            raise RankMemoryError(self.member.rank, tokens) from error

    def _compute(self, step: Compute, cache: PagedCache) -> PassResult | None:
        """This rank's part of a pass; on the last stage, the result of its shard."""
        with self._held.pace.passing() if self._held is not None else contextlib.nullcontext():
            return self._compute_pieces(step, cache)

    def _compute_pieces(self, step: Compute, cache: PagedCache) -> PassResult | None:
        member, part = self.member, self._part
        pieces = [piece for piece in step.pieces if piece.shard == member.column]
        segments = [Segment(p.tokens, p.start, p.pages, p.shard) for p in pieces]
        batch = Batch.of(segments, cache, () if member.number else self._feeds(pieces))
        tokens, each = len(batch.tokens), member.shape.expert
        x_tD = None
        if member.number:
            shape = tokens, part.hidden
            if tokens:
                x_tD = self._early.receive(shape, part.dtype, member.index(member.rank - each))
            else:
                x_tD = torch.empty(shape, dtype=part.dtype, device=part.device)
        out = part.compute(_width(step.pieces, member.shape.expert), batch, cache, _selected(pieces), x_tD)
        if cache is self._cache:
            self._counter.count(tokens)
        if member.number == self._last:
            return drawn(out, pieces, self._drawer)
        if tokens:
            self._outbox.send(out, member.index(member.rank + each))
        return None

    def _feeds(self, pieces: Sequence[Piece]) -> list[Fed]:
        """The tokens of `pieces` that the host does not know yet, from steps before."""
        unknown: dict[int, list[tuple[int, int]]] = {}
        for end, piece in zip(accumulate([len(piece.tokens) for piece in pieces]), pieces, strict=True):
            if piece.source >= 0:
                unknown.setdefault(piece.behind, []).append((piece.source, end - 1))
        return [
            Fed(self._fed[-behind], [row for row, _ in pairs], [place for _, place in pairs])
            for behind, pairs in unknown.items()
        ]

    def _collect_oldest(self) -> PassResult:
        step, own = self._begun.popleft()
        with self._explained(step):
            return self._collect(step, own)

    def _collect(self, step: Compute, own: PassResult | None) -> PassResult:
        """Of all shards, in the order of the pieces. own: of the leader's, if it is on the last stage."""
        part, wanted = self._part, Wanted.of(step.pieces)
        shards = [piece.shard for piece in step.pieces for _ in piece.selected]
        tokens_D = torch.empty(len(wanted.drawn), dtype=torch.int64, device=part.device)
        if wanted.drawn:
            own_D = None if own is None else own.tokens_D
            tokens_D = self._gather([shards[row] for row in wanted.drawn], own_D, tokens_D)
            tokens_D = checked(tokens_D, part.vocabulary)
        shape = len(wanted.kept), part.vocabulary
        logits_NV = torch.empty(shape, dtype=part.logits_dtype, device=part.device)
        kept = [shards[row] for row in wanted.kept]
        own_nV = None if own is None else own.logits_NV
        return PassResult(self._gather(kept, own_nV, logits_NV), tokens_D)

    def _gather(self, shards: Sequence[int], own_n: Tensor | None, into_N: Tensor) -> Tensor:
        """Rows of `shards`; `own_n` are those of the leader's. `into_N` is filled where they are not all."""
        first = self._last * self.member.shape.expert
        if own_n is not None and own_n.shape[0] == len(shards):
            return own_n
        if len(set(shards)) == 1 and own_n is None:
            return self._receive_from(first + shards[0], into_N)
        for shard in sorted(set(shards)):
            rows = [row for row, each in enumerate(shards) if each == shard]
            rows_n = to_device(torch.tensor(rows, dtype=torch.int64), into_N.device)
            part_n = own_n
            if first + shard != self.member.rank or part_n is None:
                part_n = self._receive_from(first + shard, into_N.new_empty(len(rows), *into_N.shape[1:]))
            into_N.index_copy_(0, rows_n, part_n)
        return into_N

    def _receive_from(self, rank: int, into: Tensor) -> Tensor:
        """What `rank` of the last stage sends to the leader."""
        self._collected_bytes += into.nbytes
        return receive(into, self.member.index(rank), self.member.back)

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
            with self._member.explained():
                channel.send(AskCounts())
                counts = channel.receive(Counts)
            layers += [(layer, [*tokens, active]) for layer, tokens, active in counts.layers]
        sums: dict[int, list[int]] = {}
        for layer, row in layers:
            sums[layer] = [a + b for a, b in zip(sums.get(layer, [0] * len(row)), row, strict=True)]
        return sums


def _pieces(
    batch: Batch, rows: Sequence[int], homes: Sequence[int], draws: Sequence[Draw | None]
) -> tuple[Piece, ...]:
    """`rows`, which rise, cut by segments. homes: the column of each shard. draws: see MeshRunner.begin."""
    pieces, first, wanted = [], 0, deque(rows)
    for segment, draw in zip_longest(batch.segments, draws):
        end, selected = first + segment.size, []
        while wanted and wanted[0] < end:
            selected.append(wanted.popleft() - first)
        own = tuple(max(0, token) for token in segment.tokens)  # one that is not known yet is filled in later
        pages = tuple(segment.pages)
        source = segment.source, segment.behind
        shard = homes[segment.shard]
        pieces.append(Piece(own, segment.start, pages, shard, tuple(selected), *source, draw))
        first = end
    return tuple(pieces)


def _width(pieces: Sequence[Piece], shards: int) -> Width:
    own: list[list[Piece]] = [[] for _ in range(shards)]
    for piece in pieces:
        own[piece.shard].append(piece)
    extents = []
    for each in own:
        counts = [len(piece.tokens) for piece in each]
        lengths = [piece.start + len(piece.tokens) for piece in each]
        extents.append(Extent.of(counts, lengths, sum(len(piece.selected) for piece in each)))
    decode = all(len(piece.tokens) == len(piece.selected) == 1 for piece in pieces)
    return Width(max(sum(extent.counts) for extent in extents), decode, extents)


def _selected(pieces: Sequence[Piece]) -> list[int]:
    """Rows of a shard's batch whose logits are wanted."""
    rows, first = [], 0
    for piece in pieces:
        rows += [first + row for row in piece.selected]
        first += len(piece.tokens)
    return rows
