"""When experts move, and where to: pure; time is an argument.

Legend: E routed experts of a layer, M places over the ranks of a stage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_worker.mesh.placement import Topology, imbalance, nearest, placement

# Choices of experts, for each expert of a layer, below which differences of load are taken for chance.
FEWEST_CHOICES = 32
# Of the imbalance above 1, a move has to take away at least so much to be worth it.
LEAST_GAIN = 0.1
SAMPLES = 4


@dataclass(frozen=True)
class RebalancePolicy:
    """interval_s: least time between two rebalancings; loads that are so old count half.

    threshold: load of the busiest rank over the mean of a stage, above which experts of a layer move.
    """

    automatic: bool = True
    interval_s: float = 300.0
    threshold: float = 1.2

    @property
    def sample_s(self) -> float:
        """Time between two readings of the counters."""
        return self.interval_s / SAMPLES


class DecayedLoads:
    """Tokens of each expert by layer; half of each counts after `half_life_s` seconds."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._loads: dict[int, list[float]] = {}
        self._counted: dict[int, list[int]] = {}
        self._at = 0.0

    def add(self, counts: Iterable[tuple[int, Sequence[int]]], now: float) -> None:
        """counts: by layer the tokens of each expert [E] since the start, at `now`, in seconds."""
        kept = 0.5 ** (max(0.0, now - self._at) / self._half_life_s)
        self._at = now
        for layer, tokens_E in counts:
            before = self._counted.get(layer, [0] * len(tokens_E))
            loads = self._loads.get(layer, [0.0] * len(tokens_E))
            pairs = zip(loads, tokens_E, before, strict=True)
            self._loads[layer] = [load * kept + max(0, new - old) for load, new, old in pairs]
            self._counted[layer] = list(tokens_E)

    def of(self, layer: int) -> list[float]:
        """The load of each expert, [E]; empty where nothing was counted."""
        return self._loads.get(layer, [])


def better_places(
    loads_E: Sequence[float], present_M: Sequence[int], topology: Topology, redundant: int, threshold: float
) -> tuple[int, ...] | None:
    """Where the experts of a layer belong, [M]; None where they may stay."""
    if sum(loads_E) < FEWEST_CHOICES * max(1, len(loads_E)):
        return None
    now = imbalance(loads_E, present_M, topology.ranks)
    if now <= threshold:
        return None
    (wanted_M,) = placement([loads_E], topology, redundant)
    after = imbalance(loads_E, wanted_M, topology.ranks)
    if after - 1 > (1 - LEAST_GAIN) * (now - 1):
        return None
    return nearest(wanted_M, present_M, topology.ranks)
