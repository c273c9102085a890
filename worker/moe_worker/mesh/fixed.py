"""Dispatch in exchanges of fixed size, for the Triton kernels: shapes are known before the routing is.

Every rank may send `capacity` tokens to each other one, so that CUDA graphs capture an exchange and the host
never waits for counts. Its own tokens stay with it, always all of them. `capacity_for` gives what balanced
routing needs and a margin. Where that is less than all tokens and some find no room, the pass is computed
again with room for all (`Exchanges.overflowed`): no token is ever dropped.

Legend: T own tokens, K experts of a token, E ranks, S rows in all, D hidden.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from moe_worker.kernels.triton.exchange import Places, Slots, pack, sum_rows, unpack
from moe_worker.kernels.triton.norm import Activation, Added
from moe_worker.mesh.dispatch import AllToAllDispatch, PlaceTable
from moe_worker.mesh.exchange import all_to_all, highest
from moe_worker.models.cuda_layer import Exchange, Work
from moe_worker.moe.dispatch import Dispatch

# Room over what balanced routing needs, and the fewest tokens for which less than room for all is reserved.
MARGIN, FEW = 1.25, 32


def capacity_for(tokens: int, ranks: int, top_k: int) -> int:
    """Tokens of `tokens` that a rank may send to each of the `ranks` - 1 others, of at most all: pure.

    A token needs a rank with probability 1 - (1 - 1 / ranks) ** top_k where all experts are equally likely.
    """
    share = 1 - (1 - 1 / ranks) ** top_k
    wanted = -(-int(tokens * share * MARGIN) // 8) * 8
    return tokens if tokens <= FEW or wanted > 0.9 * tokens else wanted


class Exchanges:
    """The exchanges of a rank's layers over `group`; None: it is alone until it rejoins.

    most: of Slots, over all layers of a pass, int32 [1].
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._made: list[FixedExchange] = []
        self._muted = False
        self.most = torch.zeros(1, dtype=torch.int32, device=device)

    def of(self, dispatch: Dispatch, held: int) -> Exchange | None:
        """For a layer of which this rank holds `held` experts, the shared ones among them."""
        if not isinstance(dispatch, AllToAllDispatch):
            return None
        made = FixedExchange(dispatch.table, held, self._group, self.most, lambda: self._muted)
        self._made.append(made)
        return made

    @property
    def ranks(self) -> int:
        """That take part."""
        return 1 if self._group is None else self._group.size()

    def rejoin(self, group: dist.ProcessGroup) -> None:
        """Goes on over `group`; `place` of all layers follows."""
        self._group = group
        for each in self._made:
            each.rejoin(group)

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Meanwhile nothing is exchanged, and others have no tokens: passes need no other rank."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def overflowed(self, capacity: int) -> bool:
        """Whether a rank had more than `capacity` tokens for another in the newest pass; all ranks know."""
        if self._group is None or self.ranks == 1:
            return False
        highest(self.most, self._group)
        return int(self.most) > capacity

    def all_have(self, own: bool) -> bool:
        """Whether `own` is true on all ranks, which call this together. Raises MeshError."""
        if self._group is None or self.ranks == 1:
            return own
        lacking = torch.tensor([not own], dtype=torch.int32, device=self.most.device)
        highest(lacking, self._group)
        return not int(lacking)

    @property
    def sent_bytes(self) -> int:
        """Bytes to other ranks since the start, of passes that were launched one by one, not by graphs."""
        return sum(each.sent_bytes for each in self._made)


class FixedExchange:
    """An Exchange of one layer. Its memory stays the same, also where experts move: graphs hold addresses.

    group: None: of this rank alone. muted: whether nothing is exchanged now.
    """

    def __init__(
        self, table: PlaceTable, held: int, group: dist.ProcessGroup | None, most: Tensor,
        muted: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._group, self._most, self._muted, self._rejoined = group, most, muted, False
        self._places = self._room(table)
        self.place(table)
        self._counts_H = torch.zeros(held, dtype=torch.int32, device=most.device)
        self._slots: Slots | None = None
        self._away = 0
        self.sent_bytes = 0

    def _room(self, table: PlaceTable) -> Places:
        """For the places of experts among the ranks of the group, as many as `table` has places for."""
        routed, device = len(table.copies_A) - 1, self._most.device
        # An expert may get all copies that there are, later.
        most = max(table.places_AC.shape[1], table.each * table.ranks - routed + 1)
        places_AN = torch.zeros(routed, most, dtype=torch.int32, device=device)
        copies_A = torch.ones(routed, dtype=torch.int32, device=device)
        own, ranks = (0, 1) if self._group is None else (self._group.rank(), self._group.size())
        return Places(places_AN, copies_A, table.each, own, ranks)

    def rejoin(self, group: dist.ProcessGroup) -> None:
        """Goes on over other connections, perhaps between other ranks; `place` follows."""
        self._group, self._rejoined = group, True

    def place(self, table: PlaceTable) -> None:
        """From the next pass on experts are where `table` says."""
        if self._rejoined:
            self._places, self._rejoined = self._room(table), False
        table = table.to(self._most.device)
        places_AC, copies_A = table.places_AC[:-1], table.copies_A[:-1]
        self._places.places_AN[:, : places_AC.shape[1]].copy_(places_AC)
        self._places.copies_A.copy_(copies_A)

    def scatter(
        self, x: Activation, rounded: bool, experts_TK: Tensor, weights_TK: Tensor, capacity: int
    ) -> Work:
        """Sends tokens to their experts, and takes in those for this rank's."""
        counts_H, places = self._counts_H, self._places
        payload, self._slots = pack(
            x, rounded, experts_TK, weights_TK, places, capacity, counts_H, self._most
        )
        self._away = (places.ranks - 1) * capacity
        received = payload[: self._away]
        if self._away:
            received = self._exchanged(received, torch.empty_like(received), capacity, nothing=-1)
        x, experts_SK, weights_SK = unpack(
            received, payload, self._away, x, rounded, experts_TK.shape[1], counts_H
        )
        return Work(x, experts_SK, weights_SK, counts_H)

    def gather(self, added: Added) -> Added:
        """Sends sums back; those for each own token are its rows of the result."""
        slots, self._slots = self._slots, None
        if slots is None:
            raise ValueError("gather follows scatter")
        size, width = slots.source_S.shape[0], added.rows_MD.shape[1]
        back = torch.empty(size, width, dtype=added.rows_MD.dtype, device=added.rows_MD.device)
        sent = torch.empty_like(back[: self._away])
        sum_rows(added, self._away, sent, back)
        if self._away:
            capacity = self._away // (self._places.ranks - 1)
            into = back[: self._away].view(torch.int32)
            self._exchanged(sent.view(torch.int32), into, capacity, nothing=0)
        return Added(back, slots.row_TE.flatten(), slots.chosen_TE.flatten())

    def _exchanged(self, rows: Tensor, into: Tensor, capacity: int, nothing: int) -> Tensor:
        """nothing: what `into` is filled with while exchanges are muted."""
        if self._muted():
            return into.fill_(nothing)
        own, ranks = self._places.own, self._places.ranks
        splits = [0 if rank == own else capacity for rank in range(ranks)]
        all_to_all(into, rows, self._group, splits, splits)
        self.sent_bytes += rows.numel() * rows.element_size()
        return into
