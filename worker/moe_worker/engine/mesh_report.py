"""What the leader of a mesh reports of it: layers of each stage, ranks, and the load of each rank."""

from dataclasses import replace

from moe_worker.config.mesh import MeshReport
from moe_worker.engine.statistics import ExpertStatistics
from moe_worker.mesh.rebalance.execute import Rebalancing
from moe_worker.mesh.runner import MeshRunner


class MeshReporter:
    """Of the mesh that `runner` runs as its leader. epoch: of the first formation."""

    def __init__(self, runner: MeshRunner, rebalancing: Rebalancing, epoch: int) -> None:
        self._runner, self._rebalancing, self._epoch = runner, rebalancing, epoch

    @classmethod
    def of(cls, runner: MeshRunner, epoch: int) -> "MeshReporter | None":
        """None where `runner` does not know where experts are."""
        return None if runner.rebalancing is None else cls(runner, runner.rebalancing, epoch)

    @property
    def report(self) -> MeshReport:
        """As of now."""
        member, rebalancing = self._runner.member, self._rebalancing
        return MeshReport(
            member.shape.pipeline,
            member.shape.expert,
            self._epoch + member.formation,
            tuple((own.start, len(own)) for own in rebalancing.stages),
            member.present,
            rebalancing.places.redundant,
            rebalancing.count,
        )

    def with_ranks(self, experts: ExpertStatistics) -> ExpertStatistics:
        """The statistics with the recent load of each rank of a layer's stage. Raises MeshError."""
        if not self._rebalancing.places.layers:
            return experts
        self._rebalancing.sample()
        layers = (
            layer._replace(rank_tokens=self._rebalancing.rank_loads(layer.layer)) for layer in experts.layers
        )
        return replace(experts, layers=tuple(layers))
