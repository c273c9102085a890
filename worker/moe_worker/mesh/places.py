"""Which expert stands at each place of each layer, the same at all ranks of a mesh: pure.

Legend: E routed experts of a layer, M places over the ranks of a stage.
"""

from collections.abc import Iterable, Mapping, Sequence

from moe_worker.config.model import ModelConfig
from moe_worker.config.routing_report import RoutingReport
from moe_worker.mesh.affinity import gathered
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.placement import Topology, placement

Moved = Mapping[int, tuple[int, ...]]


def advised(config: ModelConfig, ranks: int, redundant: int, report: RoutingReport | None) -> Moved:
    """Places by layer [M] that suit the loads and domains in the checkpoint's routing.json, if it has them.

    Raises SettingsError where experts cannot be spread evenly.
    """
    if report is None or ranks == 1:
        return {}
    topology, experts = _topology(config, ranks), config.moe.routed
    found = {}
    for layer in config.moe_layers:
        loads_E = report.loads.get(layer, ())
        if len(loads_E) != experts or not sum(loads_E):
            continue
        (places_M,) = placement([loads_E], topology, redundant)
        shares_NE = () if report.domains is None else report.domains.shares.get(layer, ())
        if shares_NE and len(shares_NE[0]) == experts:
            places_M = gathered(places_M, shares_NE, loads_E, ranks, config.moe.routing.top_k)
        found[layer] = places_M
    return found


def _topology(config: ModelConfig, ranks: int) -> Topology:
    return Topology(ranks, groups=config.moe.routing.groups, apart=True)


class ExpertPlaces:
    """Places of a model's routed experts over the `ranks` of a stage.

    layers: those with routed experts; none where a stage has one rank. moved: by layer, the expert at each
    place [M], where that is not the placement for equal loads. Raises SettingsError where experts cannot be
    spread evenly.
    """

    def __init__(self, config: ModelConfig, ranks: int, redundant: int) -> None:
        self.ranks, self.experts, self.redundant = ranks, config.moe.routed, redundant
        self.topology = _topology(config, ranks)
        self.layers = config.moe_layers if ranks > 1 else ()
        self.moved: dict[int, tuple[int, ...]] = {}
        if self.layers:
            (self._even_M,) = placement([[1.0] * self.experts], self.topology, redundant)

    def of(self, layer: int) -> tuple[int, ...]:
        """The expert at each place, [M]."""
        return self.moved.get(layer, self._even_M)

    def held(self, layer: int, own: int) -> tuple[int, ...]:
        """The experts at the places of rank number `own` of the stage."""
        each = len(self._even_M) // self.ranks
        return self.of(layer)[own * each : (own + 1) * each]

    def among(self, layer: int, present: Sequence[int]) -> tuple[int, ...]:
        """The expert at each place of the ranks `present` alone, by their numbers in the stage."""
        return tuple(expert for rank in present for expert in self.held(layer, rank))

    def move(self, layer: int, places_M: tuple[int, ...]) -> None:
        """Raises MeshError where `places_M` is no placement of all experts of `layer`."""
        if layer not in self.layers or len(places_M) != len(self._even_M):
            raise MeshError(
                f"the leader places {len(places_M)} experts in layer {layer}; start all ranks again"
            )
        if set(places_M) != set(range(self.experts)):
            raise MeshError(
                f"the leader leaves experts of layer {layer} without a place; start all ranks again"
            )
        self.moved[layer] = places_M

    def adopt(self, moved: Moved) -> None:
        """Places experts as the leader does. Raises MeshError."""
        self.moved = {}
        for layer, places_M in moved.items():
            self.move(layer, places_M)

    def complete(self, present: Sequence[int], layers: Iterable[int]) -> bool:
        """Whether the ranks `present` have all experts of `layers`."""
        everyone = set(range(self.experts))
        return all(set(self.among(layer, present)) == everyone for layer in layers if layer in self.layers)
