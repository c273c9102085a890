"""Dispatch by all-to-all between the ranks of a stage: exact for any routing.

A token goes once to each rank that holds one of its experts, with the numbers of that rank's places and -1
for all others; a rank that gets none takes part with nothing. Shared experts stand at every rank, and each
computes them for its own tokens: on CPUs as rows apart, which are added last. A token is then summed in the
same order whichever rank it belongs to, and has the same bits.

Legend: T own tokens, K experts of a token, E ranks, S tokens sent, one for each token and rank, R tokens
received, D hidden, A routed experts, C copies of an expert at most.
"""

import time
from collections.abc import Sequence
from copy import copy

import torch
import torch.distributed as dist
from torch import Tensor

from moe_worker.kernels.transfer import to_device
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.exchange import all_to_all
from moe_worker.moe.dispatch import Received


class PlaceTable:
    """Where the routed experts of one layer are: the i-th equal part of `places_M` is rank i's.

    places_AC: of each expert, -1 behind its last; copies_A: how many it has. The last row of both is for no
    expert.
    """

    def __init__(self, places_M: Sequence[int], experts: int, ranks: int, device: torch.device) -> None:
        self.ranks, self.each = ranks, len(places_M) // ranks
        at: list[list[int]] = [[] for _ in range(experts)]
        for place, expert in enumerate(places_M):
            at[expert].append(place)
        most = max(len(places) for places in at)
        # Ids of no expert are -1, which reads the last row.
        rows = [places + [-1] * (most - len(places)) for places in [*at, [-1]]]
        self.places_AC = torch.tensor(rows, device=device)
        self.copies_A = torch.tensor([len(places) for places in [*at, [-1]]], device=device)

    def to(self, device: torch.device) -> "PlaceTable":
        """The same on `device`; the host does not wait for it."""
        moved = copy(self)
        moved.places_AC, moved.copies_A = (
            to_device(each, device) if each.device.type == "cpu" else each.to(device)
            for each in (self.places_AC, self.copies_A)
        )
        return moved

    def places(self, experts_TK: Tensor) -> Tensor:
        """A place of each expert, -1 of none, int64 [T, K]; copies take tokens in turn."""
        turns_T1 = torch.arange(experts_TK.shape[0], device=experts_TK.device).unsqueeze(1)
        return self.places_AC[experts_TK, turns_T1 % self.copies_A[experts_TK]]


class AllToAllDispatch:
    """A Dispatch of one layer over `group`; None: `rejoin` gives it one before the first pass.

    sent_bytes, seconds: what went out to other ranks since the start, and the time in exchanges.
    """

    def __init__(self, table: PlaceTable, experts: int, group: dist.ProcessGroup | None) -> None:
        self.table, self._experts, self._group = table, experts, group
        self._ranks, self._own = (group.size(), group.rank()) if group is not None else (1, 0)
        self._sent_S = torch.empty(0, dtype=torch.int64)
        self._splits: tuple[list[int], list[int]] = [], []
        self._tokens, self._apart = 0, 0
        self.sent_bytes, self.seconds = 0, 0.0

    def place(self, table: PlaceTable) -> None:
        """From the next pass on experts are where `table` says."""
        self.table = table

    def rejoin(self, group: dist.ProcessGroup) -> None:
        """Goes on over other connections, perhaps between other ranks of the stage; `place` follows."""
        self._group = group
        self._ranks, self._own = group.size(), group.rank()

    def scatter(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        """Sends tokens to their experts, and takes in those for this rank's. Raises MeshError."""
        if self.table.ranks != self._ranks:
            raise MeshError(
                f"experts are placed at {self.table.ranks} ranks, but {self._ranks} are connected"
            )
        owners_TK, local_TK = self._locate(experts_TK)
        shared_TK = experts_TK >= self._experts
        apart = x_TD.device.type == "cpu" and bool(shared_TK.any())
        if apart:
            owners_TK = torch.where(shared_TK, -1, owners_TK)
        ranks_E = torch.arange(self._ranks, device=x_TD.device)
        needed_ET = (owners_TK.unsqueeze(0) == ranks_E[:, None, None]).any(dim=2)
        rank_S, token_S = needed_ET.nonzero(as_tuple=True)
        mine_SK = owners_TK[token_S] == rank_S.unsqueeze(1)
        local_SK = torch.where(mine_SK, local_TK[token_S], -1)
        weights_SK = torch.where(mine_SK, weights_TK[token_S], 0)
        # Numbers of places are exact in float32 up to 2 ** 24.
        meta_S = torch.cat((local_SK.float(), weights_SK.float()), dim=1).view(torch.uint8)
        payload_S = torch.cat((x_TD[token_S].view(torch.uint8), meta_S), dim=1)
        self._tokens, self._sent_S = x_TD.shape[0], token_S
        self._splits = self._counts(needed_ET.sum(dim=1))
        payload_R = self._exchange(payload_S, *self._splits)
        width, per_token = x_TD.shape[1] * x_TD.element_size(), experts_TK.shape[1]
        x_RD = payload_R[:, :width].contiguous().view(x_TD.dtype)
        meta_R = payload_R[:, width:].contiguous().view(torch.float32)
        received = Received(x_RD, meta_R[:, :per_token].long(), meta_R[:, per_token:])
        self._apart = self._tokens if apart else 0
        if not apart:
            return received
        own = (x_TD, torch.where(shared_TK, local_TK, -1), torch.where(shared_TK, weights_TK, 0))
        return Received(*map(torch.cat, zip(received, own, strict=True)))

    def gather(self, out_RD: Tensor) -> Tensor:
        """Sends outputs back, and sums those of each own token, in the order of the ranks."""
        sent, received = self._splits
        routed = out_RD.shape[0] - self._apart
        out_SD = self._exchange(out_RD[:routed].contiguous(), received, sent)
        out_TD = out_SD.new_zeros(self._tokens, out_SD.shape[1]).index_add_(0, self._sent_S, out_SD)
        return out_TD.add_(out_RD[routed:]) if self._apart else out_TD

    def _locate(self, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The rank of each expert and its number there; -1 of none. Shared experts are at hand."""
        shared_TK = experts_TK >= self._experts
        places_TK = self.table.places(experts_TK.masked_fill(shared_TK, -1))
        owners_TK = places_TK.div(self.table.each, rounding_mode="floor")
        local_TK = torch.where(places_TK < 0, -1, places_TK % self.table.each)
        behind_TK = experts_TK - self._experts + self.table.each
        return torch.where(shared_TK, self._own, owners_TK), torch.where(shared_TK, behind_TK, local_TK)

    def _counts(self, sent_E: Tensor) -> tuple[list[int], list[int]]:
        """Tokens for each rank, and from each."""
        received_E = torch.empty_like(sent_E)
        begin = time.perf_counter()
        all_to_all(received_E, sent_E, self._group)
        self.seconds += time.perf_counter() - begin
        return sent_E.tolist(), received_E.tolist()

    def _exchange(self, rows_SX: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out_RX = rows_SX.new_empty(sum(received), rows_SX.shape[1])
        begin = time.perf_counter()
        all_to_all(out_RX, rows_SX, self._group, received, sent)
        self.seconds += time.perf_counter() - begin
        away = sum(sent) - sent[self._own]
        self.sent_bytes += away * rows_SX.shape[1] * rows_SX.element_size()
        return out_RX
