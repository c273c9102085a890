"""Launches steps: builds the batch, computes the forward pass, and samples; the host does not wait for it.

Legend: N rows that sample, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.engine.active import ActiveRequest
from moe_worker.engine.expert_usage import ExpertUsage
from moe_worker.engine.flight import Flight
from moe_worker.engine.guiding import Flights, StepGuides
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.scoring import Span, score_spans, spans
from moe_worker.kernels.transfer import to_device
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models.batch import Batch
from moe_worker.sampling.guides import Allowed
from moe_worker.sampling.sampler import Logprobs, Sampled, Sampler
from moe_worker.scheduler.plan import UNKNOWN_TOKEN, Chunk, Step


class Launcher:
    """The device's side of the engine: model, cache, sampler, and the masks of output formats.

    ahead: whether a step can be launched before the tokens of the previous one are known. feeds: whether a
    mesh gets the sampled tokens from this device, one for each row of logits.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.guides, self.experts = StepGuides(loaded), ExpertUsage(loaded)
        self._runner, self._cache = loaded.runner, loaded.cache
        self._sampler = Sampler(loaded.config.vocab_size, loaded.device, loaded.config.eos_token_ids)
        runner = loaded.runner
        self._fed = runner if isinstance(runner, MeshRunner) and runner.feeds else None
        self.feeds = self._fed is not None
        self.ahead = loaded.device.type == "cuda" and (loaded.member is None or self._fed is not None)

    def launch(self, step: Step, active: Sequence[ActiveRequest], flights: Flights) -> Flight[ActiveRequest]:
        """Launches `step`, whose chunks belong to `active`; `flights` are the steps before it, oldest first.

        Raises torch.OutOfMemoryError, and MeshError if a rank of a mesh is lost.
        """
        sources = [_source(chunk, flights) for chunk in step.chunks]
        placed = zip(active, step.chunks, sources, strict=True)
        batch = Batch.of([each.follow(chunk, source) for each, chunk, source in placed], self._cache)
        if self._fed is None:
            _fill_in(sources, batch, flights)
        rows = [row for row, chunk in zip(batch.last_rows, step.chunks, strict=True) if chunk.samples]
        pairs = zip(step.chunks, active, strict=True)
        sampling = [(chunk.id, each) for chunk, each in pairs if chunk.samples]
        masks = self.guides.begin(sampling, flights)
        wanted = spans(step.chunks, active)
        logits = self._logits(batch, rows, wanted)
        self.experts.count(step)
        sampled = self._sample(logits.sampled_NV, sampling, masks()) if sampling else None
        return Flight(step, sampling, sampled, wanted, logits.scores)

    def _logits(self, batch: Batch, rows: Sequence[int], wanted: Sequence[Span]) -> "_Logits":
        """Computes the forward pass. rows: that sample."""
        scored = sorted({*rows, *(row for span in wanted for row in span.rows)})
        logits_NV = self._runner.logits(batch, self._cache, scored)
        if not wanted:
            return _Logits(logits_NV)
        places_N = torch.tensor([bisect_left(scored, row) for row in rows], dtype=torch.int64)
        sampled_NV = logits_NV.index_select(0, to_device(places_N, logits_NV.device))
        return _Logits(sampled_NV, score_spans(logits_NV, scored, wanted))

    def release(self, request: int) -> None:
        """Frees what the device holds for a request that ended; ignores unknown requests."""
        self.experts.finish(request)
        self._sampler.release(request)

    def _sample(
        self, logits_NV: Tensor, sampling: Sequence[tuple[int, ActiveRequest]], allowed: Allowed | None
    ) -> Sampled:
        for name, active in sampling:
            if not active.admitted:
                request = active.request
                self._sampler.admit(name, request.sampling, request.seed, request.prompt, request.written)
                active.admitted = True
        sampled = self._sampler.sample(logits_NV, [name for name, _ in sampling], allowed)
        if self._fed is not None:
            self._fed.feed(sampled.tokens_B)
        return sampled


@dataclass(frozen=True)
class _Logits:
    """sampled_NV: of the rows that sample. scores: of the tokens of prompts; None: none are scored."""

    sampled_NV: Tensor
    scores: Logprobs | None = None


def _source(chunk: Chunk, flights: Flights) -> int:
    """The row of the previous step that samples the last token of `chunk`; -1 if the host knows it."""
    return flights[-1].row(chunk.id) if chunk.tokens[-1] == UNKNOWN_TOKEN else -1


def _fill_in(sources: Sequence[int], batch: Batch, flights: Flights) -> None:
    """Inserts the tokens that the host does not know yet, from the previous step, on the device."""
    unknown = [(row, source) for row, source in zip(batch.last_rows, sources, strict=True) if source >= 0]
    if unknown:
        flights[-1].copy_tokens(
            [source for _, source in unknown], [row for row, _ in unknown], batch.tokens_T
        )
