"""Which expert stands at which place, so that ranks get about equal loads: pure.

The algorithm is that of DeepSeek's expert-parallelism load balancer (github.com/deepseek-ai/EPLB): the
experts with the largest load a copy get the spare places, and copies are packed onto ranks, the largest load
first, each to the rank that has the least so far. Hierarchical: first whole groups of experts are packed
onto nodes, then copies and ranks are found inside each node, so that a token's groups (which its router
limits) lie on few nodes. Global: as if all ranks were one node.

Apart, which is not in that algorithm: copies of an expert stand at different ranks wherever that is possible,
and where there are as many spare places as experts, each expert has two. Then the other ranks have all
experts of one that is lost.

Legend: L layers, E experts, M places over all ranks.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moe_worker.errors import SettingsError


@dataclass(frozen=True)
class Topology:
    """ranks of equally many places, on `nodes` nodes; `groups` of experts that routers keep together.

    apart: whether copies of an expert stand apart.
    """

    ranks: int
    nodes: int = 1
    groups: int = 1
    apart: bool = False


def placement(
    loads_LE: Sequence[Sequence[float]], topology: Topology, redundant: int = 0
) -> list[tuple[int, ...]]:
    """The expert at each of E + redundant places, a row a layer; rank r has the r-th equal part of a row.

    Hierarchical where the groups can be spread evenly over the nodes, else global. Raises SettingsError where
    places cannot be spread evenly over the ranks.
    """
    return [_place_layer(list(loads_E), topology, redundant) for loads_E in loads_LE]


def rank_loads(loads_E: Sequence[float], places_M: Sequence[int], ranks: int) -> list[float]:
    """The load of each rank, where an expert's copies share its load evenly."""
    copies = Counter(places_M)
    each = len(places_M) // ranks
    return [
        sum(loads_E[expert] / copies[expert] for expert in places_M[rank * each : (rank + 1) * each])
        for rank in range(ranks)
    ]


def imbalance(loads_E: Sequence[float], places_M: Sequence[int], ranks: int) -> float:
    """The load of the busiest rank over the mean, 1 at least; an expert's copies share its load evenly."""
    sums = rank_loads(loads_E, places_M, ranks)
    return max(sums) * ranks / sum(sums) if sum(sums) else 1.0


def nearest(wanted_M: Sequence[int], present_M: Sequence[int], ranks: int) -> tuple[int, ...]:
    """`wanted_M` with its ranks renumbered and its places reordered, so that few experts leave their place.

    Ranks are matched greedily, those with the most experts in common first.
    """
    wanted, present = _parts(wanted_M, ranks), _parts(present_M, ranks)
    common = [[(Counter(new) & Counter(old)).total() for old in present] for new in wanted]
    pairs = sorted(itertools.product(range(ranks), repeat=2), key=lambda pair: -common[pair[0]][pair[1]])
    matched: dict[int, int] = {}
    for new, old in pairs:
        if new not in matched.values() and old not in matched:
            matched[old] = new
    return tuple(
        expert for rank, own in enumerate(present) for expert in _in_place(wanted[matched[rank]], own)
    )


def _parts(places_M: Sequence[int], ranks: int) -> list[Sequence[int]]:
    each = len(places_M) // ranks
    return [places_M[rank * each : (rank + 1) * each] for rank in range(ranks)]


def _in_place(wanted: Sequence[int], present: Sequence[int]) -> list[int]:
    """`wanted` in an order in which those that are in `present` keep their place."""
    left, kept = Counter(wanted), dict[int, int]()
    for place, expert in enumerate(present):
        if left[expert]:
            left[expert] -= 1
            kept[place] = expert
    others = iter(left.elements())
    return [kept[place] if place in kept else next(others) for place in range(len(present))]


def _place_layer(loads_E: list[float], topology: Topology, redundant: int) -> tuple[int, ...]:
    experts, places = len(loads_E), len(loads_E) + redundant
    if places % topology.ranks:
        raise SettingsError(
            f"{experts} experts and {redundant} redundant ones cannot spread evenly over {topology.ranks} "
            f"ranks; use {-experts % topology.ranks} redundant experts, or {topology.ranks} more"
        )
    nodes, groups = topology.nodes, topology.groups
    if groups % nodes or topology.ranks % nodes or experts % groups:
        nodes, groups = 1, 1
    size = experts // groups
    group_loads = [sum(loads_E[group * size : (group + 1) * size]) for group in range(groups)]
    found: list[int] = []
    for members in _pack(group_loads, nodes, range(groups)):
        own = [group * size + i for group in members for i in range(size)]
        found += _place_node(own, loads_E, places // nodes, topology.ranks // nodes, topology.apart)
    return tuple(found)


def _place_node(own: list[int], loads_E: list[float], places: int, ranks: int, apart: bool) -> list[int]:
    """The expert at each place of a node that has experts `own`."""
    each = min(2, places // len(own)) if apart and ranks > 1 else 1
    copies = dict.fromkeys(own, each)
    chosen = own * each
    while len(chosen) < places:
        busiest = max(own, key=lambda expert: loads_E[expert] / copies[expert])
        copies[busiest] += 1
        chosen.append(busiest)
    loads = [loads_E[expert] / copies[expert] for expert in chosen]
    kinds = chosen if apart else range(places)
    return [chosen[item] for items in _pack(loads, ranks, kinds) for item in items]


def _pack(loads: Sequence[float], packs: int, kinds: Sequence[int]) -> list[list[int]]:
    """Equally many items for each pack: the largest load first, into the pack with the least so far.

    Items of one kind go to different packs.
    """
    each = len(loads) // packs
    if each == 1:
        return [[item] for item in range(packs)]
    items: list[list[int]] = [[] for _ in range(packs)]
    sums, held = [0.0] * packs, [set[int]() for _ in range(packs)]
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        room = [pack for pack in range(packs) if len(items[pack]) < each]
        apart = [pack for pack in room if kinds[item] not in held[pack]]
        pack = min(apart or room, key=sums.__getitem__)
        items[pack].append(item)
        held[pack].add(kinds[item])
        sums[pack] += loads[item]
    for pack in range(packs):
        _separate(pack, items, loads, kinds)
    return items


def _separate(pack: int, items: list[list[int]], loads: Sequence[float], kinds: Sequence[int]) -> None:
    """Exchanges items that `pack` has twice for the most similar ones of other packs, where there are any."""

    def has(where: int, kind: int) -> bool:
        return any(kinds[item] == kind for item in items[where])

    for place, item in enumerate(items[pack]):
        if [kinds[other] for other in items[pack]].count(kinds[item]) < 2:
            continue
        found = [
            (abs(loads[other] - loads[item]), where, at)
            for where in range(len(items))
            if where != pack and not has(where, kinds[item])
            for at, other in enumerate(items[where])
            if not has(pack, kinds[other])
        ]
        if found:
            _, where, at = min(found)
            items[pack][place], items[where][at] = items[where][at], item
