"""The experts that steps use: counted for statistics, and learned by domain if the user enabled that."""

from dataclasses import replace

from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.statistics import DomainExperts, ExpertStatistics, LayerExperts
from moe_worker.models.runner import TellsChoices
from moe_worker.moe.learning import RoutingLearner
from moe_worker.scheduler.plan import Step


class ExpertUsage:
    """Of one loaded model, from now on."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._counter = loaded.runner.expert_counter()
        self._runner, self._learner = loaded.runner, loaded.learner
        self._most, self._tokens = loaded.config.moe.top_k, 0

    def count(self, step: Step) -> None:
        """Records the forward pass of `step`, the newest one."""
        self._counter.count(step.tokens)
        self._tokens += step.tokens
        if self._learner is not None and isinstance(self._runner, TellsChoices):
            chunks = ((chunk.id, len(chunk.tokens)) for chunk in step.chunks)
            self._learner.take(self._runner.choices(), chunks)

    def finish(self, request: int) -> None:
        """Lets the learner use the experts of a request that ended."""
        if self._learner is not None:
            self._learner.finish(request)

    def read(self) -> ExpertStatistics:
        """The statistics so far. Waits for the device; raises MeshError if a rank of a mesh is lost."""
        steps, layers = self._counter.read()
        rows = tuple(LayerExperts(layer, tuple(tokens), active) for layer, tokens, active in layers)
        found = ExpertStatistics(steps, rows, tokens=self._tokens, experts_per_token=self._most)
        if self._learner is None:
            return found
        return replace(found, domains=_domains(self._learner), fit=self._learner.matrix.fit())


def _domains(learner: RoutingLearner) -> tuple[DomainExperts, ...]:
    matrix = learner.matrix
    named = zip(learner.names, matrix.tokens_N, matrix.affinity().unbind(1), strict=True)
    return tuple(
        DomainExperts(name, tokens, tuple(map(tuple, shares_LE.tolist())))
        for name, tokens, shares_LE in named
    )
