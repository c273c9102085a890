"""A model that is spread over the ranks of a mesh: what this rank needs to run its part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.config.model import ModelConfig
from moe_worker.config.routing_report import read_routing_report
from moe_worker.kvcache.paged import PagedCache
from moe_worker.mesh.identity import mesh_digest
from moe_worker.mesh.member import Member, join
from moe_worker.mesh.part import part_of, stage_ranges
from moe_worker.mesh.places import ExpertPlaces, advised
from moe_worker.mesh.rank_stage import RankStage
from moe_worker.mesh.rebalance.execute import Rebalancing
from moe_worker.mesh.rebalance.hold import HeldExperts, ReadExperts
from moe_worker.mesh.rebalance.pace import Pace
from moe_worker.mesh.rebalance.plan import RebalancePolicy
from moe_worker.mesh.recovery import start_together
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models.checkpoint import ExpertReader
from moe_worker.models.safetensors import StoredTensor, stored_tensors
from moe_worker.models.stage import Stage
from moe_worker.models.stored import Placement


@dataclass(frozen=True)
class Spread:
    """This process in its mesh, and the model that the mesh serves."""

    directory: Path
    config: ModelConfig
    options: EngineOptions
    placement: Placement
    member: Member
    stored: Mapping[str, StoredTensor]
    places: ExpertPlaces

    @classmethod
    def join(
        cls, directory: Path, config: ModelConfig, options: EngineOptions, placement: Placement
    ) -> "Spread":
        """Meets the other ranks. Raises MeshError, SettingsError."""
        stored = stored_tensors(directory)
        ranks, redundant = options.mesh_shape.expert, options.redundant_experts
        places = ExpertPlaces(config, ranks, redundant)
        # Once, by the leader: it takes time, and processors round differently.
        leads = options.mesh_rank == 0
        moved = advised(config, ranks, redundant, read_routing_report(directory)) if leads else {}
        member = join(options, mesh_digest(directory, stored, options), placement.device, moved)
        places.adopt(member.moved)
        return cls(directory, config, options, placement, member, stored, places)

    def stage(self) -> Stage:
        """What this rank holds. Raises SettingsError where the model cannot be spread over the mesh."""
        return part_of(self.config, self.member, self.stored, self.places, self.placement.device)

    def runner(self, part: RankStage, cache: PagedCache, feeds: bool = False) -> MeshRunner:
        """Runs `part`; on the leader the whole mesh. All ranks call it. Raises MeshError."""
        places = self.places
        start_together(self.member, part, cache.pages)
        pace = Pace(launches=part.device.type == "cuda")
        held = HeldExperts(places, self.member, part, self._read(part), pace)
        runner = MeshRunner(self.member, part, cache, feeds, held, self.options.mesh_reforms)
        if self.member.leads:
            stages = stage_ranges(self.config, self.member.shape, self.stored)
            counter = runner.expert_counter()
            runner.direct(Rebalancing(self._policy(), places, held, self.member, stages, counter))
        return runner

    def _policy(self) -> RebalancePolicy:
        options = self.options
        return RebalancePolicy(
            rebalances(options.rebalance, self.placement.device),
            options.rebalance_interval,
            options.rebalance_threshold,
        )

    def _read(self, part: RankStage) -> ReadExperts:
        reader = ExpertReader(self.directory, self.config, self.placement)

        def read(
            layer: int, before: Sequence[int], held: Sequence[int], rest: Callable[[], object]
        ) -> object:
            with torch.inference_mode(), part.aside():
                return part.prepared(layer, before, held, partial(reader.read, layer), rest)

        return read


def rebalances(mode: str, device: torch.device) -> bool:
    """Whether experts move while ranks on `device` serve: on GPUs only where the mode asks for it."""
    return mode == "on" or (mode == "auto" and device.type == "cpu")
