"""What the leader of a mesh reports of it: layers of each stage, and the load of each rank."""

from dataclasses import replace
from pathlib import Path

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshReport
from moe_worker.config.model import ModelConfig
from moe_worker.engine.statistics import ExpertStatistics
from moe_worker.mesh.part import stage_ranges
from moe_worker.mesh.placement import Topology, placement, rank_loads
from moe_worker.models.safetensors import stored_tensors


class MeshReporter:
    """Of the mesh that `options` describe, for a model of `config` in `directory`; all ranks take part."""

    def __init__(self, directory: Path, config: ModelConfig, options: EngineOptions) -> None:
        shape = options.mesh_shape
        ranges = stage_ranges(config, shape, stored_tensors(directory))
        self.report = MeshReport(
            shape.pipeline,
            shape.expert,
            options.mesh_epoch,
            tuple((own.start, len(own)) for own in ranges),
            tuple(range(shape.ranks)),
            options.redundant_experts,
        )
        self._ranks = shape.expert
        even = [[1.0] * config.moe.routed]
        topology = Topology(shape.expert, groups=config.moe.routing.groups)
        (self._places_M,) = placement(even, topology, options.redundant_experts)

    def with_ranks(self, experts: ExpertStatistics) -> ExpertStatistics:
        """The statistics with the tokens of each rank of a layer's stage; copies share an expert's evenly."""
        if self._ranks == 1:
            return experts
        layers = tuple(
            layer._replace(rank_tokens=tuple(rank_loads(layer.tokens, self._places_M, self._ranks)))
            for layer in experts.layers
        )
        return replace(experts, layers=layers)
