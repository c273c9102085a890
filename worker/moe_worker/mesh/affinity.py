"""Puts experts that the same domains use onto the same ranks, so that a token is sent to fewer of them: pure.

A token of domain n that makes K independent choices, each on rank r with probability q_nr, uses
sum over r of 1 - (1 - q_nr)^K ranks. Swaps of places between ranks lower the mean of that over the domains,
one after the other until none does (local search after Kernighan and Lin, 1970); a rank's load over the
limit costs more than all exchange. The search begins with the places as they are and, a second time, with
places sorted by the domain that uses them most; the better end counts.

Legend: N domains, E experts, M places over all ranks, R ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_worker.mesh.placement import rank_loads

_ROUNDS = 6
_WORTH = 1e-9
# For a rank whose load is twice the limit, in ranks used.
_OVERLOAD = 1000.0


def gathered(
    places_M: Sequence[int],
    shares_NE: Sequence[Sequence[float]],
    loads_E: Sequence[float],
    ranks: int,
    choices: int,
    slack: float = 0.05,
) -> tuple[int, ...]:
    """`places_M` with experts swapped between ranks; rank r has the r-th equal part.

    shares_NE: of each domain's choices those that each expert has. choices: experts of a token. slack: how
    far a rank's load may lie above the mean; where it lies higher before, it does not grow. Two copies of an
    expert do not meet on a rank more often than before.
    """
    before_M = torch.tensor(places_M)
    search = _Search(places_M, shares_NE, loads_E, ranks, choices, slack)
    ends = [search.run(before_M), search.run(before_M[search.by_domain(before_M)])]
    most = search.meetings(before_M)
    best = min((cost, places.tolist()) for cost, places in ends if search.meetings(places) <= most)
    return tuple(best[1])


def ranks_used(
    places_M: Sequence[int], shares_NE: Sequence[Sequence[float]], ranks: int, choices: int
) -> float:
    """The ranks that a token's choices lie on, mean over domains; copies share an expert's choices evenly."""
    part_NM = _parts(torch.tensor(places_M), torch.tensor(shares_NE, dtype=torch.float64))
    return float(_used(part_NM.unflatten(1, (ranks, -1)).sum(2), choices).sum(1).mean())


class _Ranks(NamedTuple):
    """What lies on each rank: shares of the domains' choices, load, and what that costs."""

    share_NR: Tensor
    load_R: Tensor
    cost_R: Tensor


class _Search:
    def __init__(
        self,
        places_M: Sequence[int],
        shares_NE: Sequence[Sequence[float]],
        loads_E: Sequence[float],
        ranks: int,
        choices: int,
        slack: float,
    ) -> None:
        self._shares_NE = torch.tensor(shares_NE, dtype=torch.float64)
        self._loads_E = torch.tensor(loads_E, dtype=torch.float64)
        self._ranks, self._choices = ranks, choices
        self._rank_M = torch.arange(len(places_M)) * ranks // len(places_M)
        sums = rank_loads(loads_E, places_M, ranks)
        self._most = max(*sums, sum(sums) / ranks * (1 + slack))

    def by_domain(self, places_M: Tensor) -> Tensor:
        """The order of places by copy, the domain that uses the expert most, and how much."""
        share_M, domain_M = _parts(places_M, self._shares_NE).max(0)
        copy_M = (places_M[:, None] == places_M[None]).tril(-1).sum(1)
        order = sorted(
            range(len(places_M)), key=lambda m: (int(copy_M[m]), int(domain_M[m]), -float(share_M[m]))
        )
        return torch.tensor(order)

    def meetings(self, places_M: Tensor) -> int:
        """Copies of an expert on a rank that has it already."""
        return sum(len(own) - len(set(own)) for own in places_M.unflatten(0, (self._ranks, -1)).tolist())

    def run(self, places_M: Tensor) -> tuple[float, Tensor]:
        """Cost and places when no swap helps any more."""
        places_M = places_M.clone()
        part_NM = _parts(places_M, self._shares_NE)
        (load_M,) = _parts(places_M, self._loads_E[None])
        ranks = self._of_ranks(part_NM, load_M)
        for _ in range(_ROUNDS):
            swaps = 0
            for one in range(len(places_M)):
                other = self._best_swap(one, places_M, part_NM, load_M, ranks)
                if other is not None:
                    swaps += 1
                    for row in (places_M, part_NM, load_M):
                        row[..., [one, other]] = row[..., [other, one]]
                    ranks = self._of_ranks(part_NM, load_M)
            if not swaps:
                break
        return float(ranks.cost_R.sum()), places_M

    def _of_ranks(self, part_NM: Tensor, load_M: Tensor) -> "_Ranks":
        share_NR, load_R = self._per_rank(part_NM), self._per_rank(load_M[None])[0]
        return _Ranks(share_NR, load_R, self._cost(share_NR, load_R))

    def _best_swap(
        self, one: int, places_M: Tensor, part_NM: Tensor, load_M: Tensor, ranks: "_Ranks"
    ) -> int | None:
        """The place whose swap with `one` lowers the cost most, or None."""
        rank = int(self._rank_M[one])
        share_NR, load_R, cost_R = ranks
        more_NM, heavier_M = part_NM - part_NM[:, one : one + 1], load_M - load_M[one]
        here_M = self._cost(share_NR[:, rank : rank + 1] + more_NM, load_R[rank] + heavier_M)
        there_M = self._cost(share_NR[:, self._rank_M] - more_NM, load_R[self._rank_M] - heavier_M)
        gain_M = cost_R[rank] + cost_R[self._rank_M] - here_M - there_M
        ranks_RX = places_M.unflatten(0, (self._ranks, -1))
        holds_R = (ranks_RX == places_M[one]).any(1)
        gain_M[holds_R[self._rank_M] | torch.isin(places_M, ranks_RX[rank])] = 0.0
        best = int(gain_M.argmax())
        return best if float(gain_M[best]) > _WORTH else None

    def _cost(self, share_NX: Tensor, load_X: Tensor) -> Tensor:
        over_X = (load_X / self._most - 1 - _WORTH).clamp(min=0) if self._most else torch.zeros_like(load_X)
        return _used(share_NX, self._choices).mean(0) + _OVERLOAD * over_X

    def _per_rank(self, values_NM: Tensor) -> Tensor:
        return values_NM.reshape(len(values_NM), self._ranks, -1).sum(2)


def _parts(places_M: Tensor, values_NE: Tensor) -> Tensor:
    """Each place's part of its expert's value, which copies share evenly, [N, M]."""
    copies_E = torch.bincount(places_M, minlength=values_NE.shape[1])
    return values_NE[:, places_M] / copies_E[places_M]


def _used(share_NX: Tensor, choices: int) -> Tensor:
    return 1 - (1 - share_NX).clamp(min=0).pow(choices)
