"""Directs the moves of experts: all ranks of a stage prepare a layer, then switch together."""

import logging
import time
from collections.abc import Callable, Sequence

from moe_worker.mesh.member import Member
from moe_worker.mesh.messages import Prepare, Switch
from moe_worker.mesh.placement import rank_loads
from moe_worker.mesh.places import ExpertPlaces
from moe_worker.mesh.rebalance.hold import HeldExperts
from moe_worker.mesh.rebalance.plan import DecayedLoads, RebalancePolicy, better_places
from moe_worker.moe.counting import Counter

log = logging.getLogger(__name__)
# All ranks of a stage prepare a layer in this time, or its experts stay where they are.
PREPARE_S = 600.0


class Rebalancing:
    """The leader's part: reads loads, decides, and directs one move after the other.

    count: how often experts have moved. held: None where experts stay. stages: the layers of each stage.
    counter: of all ranks. clock: monotonic, seconds.
    """

    def __init__(
        self, policy: RebalancePolicy, places: ExpertPlaces, held: HeldExperts | None, member: Member,
        stages: Sequence[range], counter: Counter, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.count, self.places = 0, places
        self._policy, self._held, self._member, self.stages = policy, held, member, stages
        self._counter, self._clock = counter, clock
        self._loads = DecayedLoads(policy.interval_s)
        self._due = clock() + policy.interval_s
        self._sampled = clock()
        self._left: list[int] = []
        self._move: Prepare | None = None
        self._began = 0.0
        self._number = self._moved = 0

    @property
    def moving(self) -> bool:
        """Whether experts are on their way."""
        return self._move is not None

    def rank_loads(self, layer: int) -> tuple[float, ...]:
        """The recent load of each rank of a layer's stage; copies of an expert share its load evenly."""
        loads_E = self._loads.of(layer)
        return tuple(rank_loads(loads_E, self.places.of(layer), self.places.ranks)) if loads_E else ()

    def sample(self) -> None:
        """Reads the counters of all ranks. Raises MeshError."""
        self._sampled = self._clock()
        self._loads.add(((layer, tokens) for layer, tokens, _ in self._counter.read()[1]), self._sampled)

    def tend(self) -> None:
        """Between two passes: does what is due, at most one layer's decision. Raises MeshError."""
        if not self._policy.automatic or self._held is None or not self.places.layers or self._member.absent:
            return
        if self._move is not None:
            self._advance(self._move)
        elif self._left:
            self._decide(self._left.pop())
        elif self._clock() - self._sampled >= self._policy.sample_s:
            self.sample()
            if self._sampled >= self._due:
                self._left, self._moved = list(self.places.layers), 0

    def abandon(self) -> None:
        """Ranks have met again: what was being moved stays where it is."""
        self._move, self._left = None, []
        self._due = self._clock() + self._policy.interval_s

    def _decide(self, layer: int) -> None:
        places = self.places
        found = better_places(
            self._loads.of(layer), places.of(layer), places.topology, places.redundant, self._policy.threshold
        )
        if found is not None:
            self._begin(layer, found)
        elif not self._left:
            self._end()

    def _begin(self, layer: int, places_M: tuple[int, ...]) -> None:
        self._number += 1
        self._began = self._clock()
        self._move = move = Prepare(self._number, layer, places_M)
        self._send(move, move)
        log.info("moving experts of layer %d", layer)

    def _advance(self, move: Prepare) -> None:
        told = self._told(move)
        prepared = all(each == move.number for each in told)
        if not prepared and -move.number not in told and self._clock() - self._began < PREPARE_S:
            return
        self._move = None
        self._send(move, Switch(move.number, prepared))
        if prepared:
            self.places.move(move.layer, move.places)
            self._moved += 1
        else:
            log.warning("the experts of layer %d stay where they are: a rank has not read them", move.layer)
        if not self._left:
            self._end()

    def _told(self, move: Prepare) -> list[int]:
        """What the ranks of the move's stage say of their progress."""
        ranks = self._ranks(move)
        told = [channel.told for channel in self._member.channels if channel.rank in ranks]
        return [*told, self._held.progress] if self._held is not None and self._member.rank in ranks else told

    def _end(self) -> None:
        self._due = self._clock() + self._policy.interval_s
        if self._moved:
            self.count += 1
            log.info("experts of %d layers have moved", self._moved)

    def _ranks(self, move: Prepare) -> list[int]:
        shape = self._member.shape
        stage = next(number for number, layers in enumerate(self.stages) if move.layer in layers)
        return shape.stage_ranks(stage)

    def _send(self, move: Prepare, message: Prepare | Switch) -> None:
        ranks = self._ranks(move)
        for channel in self._member.channels:
            if channel.rank in ranks:
                channel.send(message)
        if self._held is not None and self._member.rank in ranks:
            self._held.take(message)
