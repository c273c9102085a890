"""Which expert stands at which place, so that ranks get about equal loads: pure.

The algorithm is that of DeepSeek's expert-parallelism load balancer (github.com/deepseek-ai/EPLB): the
experts with the largest load a copy get the spare places, and copies are packed onto ranks, the largest load
first, each to the rank that has the least so far. Hierarchical: first whole groups of experts are packed
onto nodes, then copies and ranks are found inside each node, so that a token's groups (which its router
limits) lie on few nodes. Global: as if all ranks were one node.

Legend: L layers, E experts, M places over all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_worker.errors import SettingsError


@dataclass(frozen=True)
class Topology:
    """ranks of equally many places, on `nodes` nodes; `groups` of experts that routers keep together."""

    ranks: int
    nodes: int = 1
    groups: int = 1


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
    copies = [places_M.count(expert) for expert in range(len(loads_E))]
    each = len(places_M) // ranks
    return [
        sum(loads_E[expert] / copies[expert] for expert in places_M[rank * each : (rank + 1) * each])
        for rank in range(ranks)
    ]


def imbalance(loads_E: Sequence[float], places_M: Sequence[int], ranks: int) -> float:
    """The load of the busiest rank over the mean, 1 at least; an expert's copies share its load evenly."""
    sums = rank_loads(loads_E, places_M, ranks)
    return max(sums) * ranks / sum(sums) if sum(sums) else 1.0


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
    for members in _pack(group_loads, nodes):
        own = [group * size + i for group in members for i in range(size)]
        found += _place_node(own, loads_E, places // nodes, topology.ranks // nodes)
    return tuple(found)


def _place_node(own: list[int], loads_E: list[float], places: int, ranks: int) -> list[int]:
    """The expert at each place of a node that has experts `own`."""
    copies = dict.fromkeys(own, 1)
    chosen = list(own)
    while len(chosen) < places:
        busiest = max(own, key=lambda expert: loads_E[expert] / copies[expert])
        copies[busiest] += 1
        chosen.append(busiest)
    loads = [loads_E[expert] / copies[expert] for expert in chosen]
    return [chosen[item] for items in _pack(loads, ranks) for item in items]


def _pack(loads: Sequence[float], packs: int) -> list[list[int]]:
    """Equally many items for each pack: the largest load first, into the pack with the least so far."""
    each = len(loads) // packs
    if each == 1:
        return [[item] for item in range(packs)]
    items: list[list[int]] = [[] for _ in range(packs)]
    sums = [0.0] * packs
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        pack = min((p for p in range(packs) if len(items[p]) < each), key=sums.__getitem__)
        items[pack].append(item)
        sums[pack] += loads[item]
    return items
