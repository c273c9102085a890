"""Puts experts that the same domains use onto the same ranks, so that a token is sent to fewer of them: pure.

A token of domain n has an expert among its K choices with probability min(1, K * share). Choices are taken as
independent: a token needs nothing of a rank with the product of (1 - probability) over the rank's experts.
That product makes the effect of all swaps of two experts one matrix product. Swaps lower the ranks that a
token uses, mean over domains, until none does (local search after Kernighan and Lin, 1970); each round
applies the best ones that share no rank, whose gains add up. A rank's load over the limit costs more than all
exchange. The search begins with the places as they are, then with places sorted by the domain that uses them
most, then with the best end so far after some swaps at random; the best end counts.

Legend: N domains, E experts, M places over all ranks, or the copies of experts that stand there, R ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_worker.mesh.placement import rank_loads

# Each round lowers the cost; 256 experts on 32 ranks need about 30.
_ROUNDS = 100
# Swaps at random are tried so often, and less often among many places.
_MOST_KICKS, _KICKED = 32, 1 << 18
# Memory and time grow with the square; published models have 512 experts at most.
MOST_PLACES = 1024
_WORTH = 1e-9
# Loads are in parts of the limit. A rank with twice the limit costs so many ranks used that no exchange is
# worth a load that is visibly over it.
_LIMIT, _OVERLOAD = 1 + 1e-9, 1e6
# The largest probability of an expert: what is certain would hide all else on its rank.
_SURE = 0.999

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


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
    expert do not meet on a rank more often than before. More than MOST_PLACES places stay as they are.
    """
    if len(places_M) > MOST_PLACES:
        return tuple(places_M)
    search = _Search(places_M, shares_NE, loads_E, ranks, choices, slack)
    start_M = _equal_parts(len(places_M), ranks)
    best = search.run(start_M)
    sorted_M = search.by_domain(start_M)
    if search.meetings(sorted_M) <= search.meetings(start_M):
        best = min(best, search.run(sorted_M), key=_cost)
    draw = np.random.default_rng(0)
    for _ in range(min(_MOST_KICKS, _KICKED // len(places_M) ** 2)):
        best = min(best, search.run(search.kicked(best.rank_M, draw)), key=_cost)
    return tuple(np.asarray(places_M)[np.argsort(best.rank_M, kind="stable")].tolist())


class _End(NamedTuple):
    """Where a search has ended: its cost, and the rank of each copy."""

    cost: float
    rank_M: Integers


def _cost(end: _End) -> float:
    return end.cost


class _Search:
    """Swaps copies of experts between ranks. rank_M: where each copy stands, in the order of `places_M`."""

    def __init__(
        self,
        places_M: Sequence[int],
        shares_NE: Sequence[Sequence[float]],
        loads_E: Sequence[float],
        ranks: int,
        choices: int,
        slack: float,
    ) -> None:
        self._expert_M, self._ranks = np.asarray(places_M), ranks
        self._share_NM = _parts(self._expert_M, np.asarray(shares_NE, dtype=np.float64))
        self._unused_NM = _unused(self._expert_M, np.asarray(shares_NE), choices)
        (load_M,) = _parts(self._expert_M, np.asarray([loads_E], dtype=np.float64))
        sums = rank_loads(loads_E, places_M, ranks)
        most = max(*sums, sum(sums) / ranks * (1 + slack))
        self._load_M: Floats = load_M / most if most else load_M
        # Fresh memory for each round would take as long as all else.
        self._gain_MM = np.empty((len(places_M), len(places_M)))

    def by_domain(self, rank_M: Integers) -> Integers:
        """Copies over the same ranks in the order of the domain that uses their expert most, and how much."""
        same_MM = self._expert_M[:, None] == self._expert_M
        order = np.lexsort((-self._share_NM.max(0), self._share_NM.argmax(0), np.tril(same_MM, -1).sum(1)))
        sorted_M = np.empty_like(rank_M)
        sorted_M[order] = rank_M
        return sorted_M

    def meetings(self, rank_M: Integers) -> int:
        """Copies of an expert on a rank that has it already."""
        return len(rank_M) - len(set(zip(rank_M.tolist(), self._expert_M.tolist(), strict=True)))

    def kicked(self, rank_M: Integers, draw: np.random.Generator) -> Integers:
        """`rank_M` with about one copy of each rank swapped at random."""
        rank_M = rank_M.copy()
        for pair in draw.integers(len(rank_M), size=(self._ranks // 2, 2)):
            swapped_M = rank_M.copy()
            swapped_M[pair] = rank_M[pair[::-1]]
            if self.meetings(swapped_M) <= self.meetings(rank_M):
                rank_M = swapped_M
        return rank_M

    def run(self, rank_M: Integers) -> _End:
        """Swaps until that does not help any more."""
        rank_M = rank_M.copy()
        for _ in range(_ROUNDS):
            cost_R, gain_MM = self._gains(rank_M)
            if not self._swap(rank_M, gain_MM):
                break
        return _End(float(cost_R.sum()), rank_M)

    def _gains(self, rank_M: Integers) -> tuple[Floats, Floats]:
        """The cost of each rank, and what each swap of two copies takes away from it."""
        on_MR = (rank_M[:, None] == np.arange(self._ranks)).astype(np.float64)
        unused_NR, load_R = np.exp(_product(np.log(self._unused_NM), on_MR)), self._load_M @ on_MR
        cost_R = 1 - unused_NR.mean(0) + _penalty(load_R - _LIMIT)
        rest_NM, rest_M = unused_NR[:, rank_M] / self._unused_NM, load_R[rank_M] - self._load_M
        half_MM = _product(rest_NM.T, self._unused_NM / len(rest_NM))
        half_MM -= _penalty(np.add.outer(rest_M - _LIMIT, self._load_M, out=self._gain_MM))
        half_MM += cost_R[rank_M][:, None] - 1
        gain_MM = np.add(half_MM, half_MM.T, out=self._gain_MM)
        meets_MM = self._held(rank_M)[:, rank_M]
        gain_MM[meets_MM | meets_MM.T] = 0
        return cost_R, gain_MM

    def _held(self, rank_M: Integers) -> NDArray[np.bool_]:
        """Whether each rank has each copy's expert, [M, R]."""
        held_ER = np.zeros((int(self._expert_M.max()) + 1, self._ranks), dtype=np.bool_)
        held_ER[self._expert_M, rank_M] = True
        held_MR: NDArray[np.bool_] = held_ER[self._expert_M]
        return held_MR

    def _swap(self, rank_M: Integers, gain_MM: Floats) -> bool:
        """Applies the best swaps that share no rank, and says whether there is any."""
        best_M = gain_MM.argmax(1)
        gain_M = gain_MM[np.arange(len(best_M)), best_M]
        order_X = np.argsort(-gain_M, kind="stable")[: int((gain_M > _WORTH).sum())]
        pairs = np.stack([order_X, best_M[order_X]], axis=1)
        taken = set[int]()
        for pair, (rank, other) in zip(pairs, rank_M[pairs].tolist(), strict=True):
            if rank not in taken and other not in taken:
                taken |= {rank, other}
                rank_M[pair] = other, rank
        return bool(taken)


def _equal_parts(places: int, ranks: int) -> Integers:
    return np.arange(places, dtype=np.int64) * ranks // places


def _parts(places_M: Integers, values_NE: Floats) -> Floats:
    """Each place's part of its expert's value, which copies share evenly, [N, M]."""
    copies_E = np.bincount(places_M, minlength=values_NE.shape[1])
    parts_NM: Floats = values_NE[:, places_M] / copies_E[places_M]
    return parts_NM


def _unused(places_M: Integers, shares_NE: Floats, choices: int) -> Floats:
    """How likely a domain's token does not need what stands at each place, [N, M]."""
    return 1 - np.minimum(choices * _parts(places_M, shares_NE), _SURE)


def _product(one: Floats, other: Floats) -> Floats:
    """Of matrices, with torch's number of threads; numpy would begin one for each core of the machine."""
    product: Floats = (torch.from_numpy(one) @ torch.from_numpy(other)).numpy()
    return product


def _penalty(over: Floats) -> Floats:
    """What loads cost by how far they are over the limit, in place."""
    np.maximum(over, 0, out=over)
    over *= _OVERLOAD
    return over
