"""Launches steps: builds the batch, computes the forward pass, and samples; on a GPU the host does not wait.

In a mesh of several stages, a launch computes the first one; the step is sampled when it is finished, which
needs the last stage. Until then the first one can compute other steps.

Legend: N rows that sample, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_worker.engine.active import ActiveRequest
from moe_worker.engine.expert_usage import ExpertUsage
from moe_worker.engine.flight import Flight, Outcome
from moe_worker.engine.guiding import Flights, Sampling, StepGuides
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
    mesh gets the sampled tokens from this device, one for each row of logits. stages: of the pipeline, which
    compute different steps at the same time.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.guides, self.experts = StepGuides(loaded), ExpertUsage(loaded)
        self._runner, self._cache = loaded.runner, loaded.cache
        self._sampler = Sampler(loaded.config.vocab_size, loaded.device, loaded.config.eos_token_ids)
        runner = loaded.runner
        self._mesh = runner if isinstance(runner, MeshRunner) else None
        self._fed = self._mesh if self._mesh is not None and self._mesh.feeds else None
        self.feeds = self._fed is not None
        self.stages = 1 if self._mesh is None else self._mesh.member.shape.pipeline
        self.ahead = loaded.device.type == "cuda" and (loaded.member is None or self._fed is not None)

    def launch(self, step: Step, active: Sequence[ActiveRequest], flights: Flights) -> Flight[ActiveRequest]:
        """Launches `step`, whose chunks belong to `active`; `flights` are the steps before it, oldest first.

        Call `finish` of the result before the next launch, or in a pipeline before its stages have nothing
        else to do. Raises torch.OutOfMemoryError, and MeshError if a rank of a mesh is lost.
        """
        sources = _sources(step.chunks, flights)
        placed = zip(active, step.chunks, sources, strict=True)
        batch = Batch.of(
            [each.follow(chunk, source.row, source.behind) for each, chunk, source in placed], self._cache
        )
        if self._fed is None:
            _fill_in(sources, batch)
        rows = [row for row, chunk in zip(batch.last_rows, step.chunks, strict=True) if chunk.samples]
        pairs = zip(step.chunks, active, strict=True)
        sampling = [(chunk.id, each) for chunk, each in pairs if chunk.samples]
        self._admit(sampling)
        masks = self.guides.begin(sampling, flights)
        wanted = spans(step.chunks, active)
        logits = self._begin(batch, rows, wanted)
        self.experts.count(step)

        def outcome() -> Outcome:
            found = logits()
            sampled = self._sample(found.sampled_NV, sampling, masks()) if sampling else None
            return sampled, found.scores

        return Flight(step, sampling, outcome, wanted, {each.request.id: each.given for each in active})

    def _begin(self, batch: Batch, rows: Sequence[int], wanted: Sequence[Span]) -> "Callable[[], _Logits]":
        """Begins the forward pass. rows: that sample."""
        scored = sorted({*rows, *(row for span in wanted for row in span.rows)})
        if self._mesh is None:
            logits_NV = self._runner.logits(batch, self._cache, scored)
            return lambda: _logits(logits_NV, rows, scored, wanted)
        collect = self._mesh.begin(batch, self._cache, scored)
        return lambda: _logits(collect(), rows, scored, wanted)

    def discard(self) -> None:
        """Forgets the steps that are not finished; what other ranks computed of them is received."""
        if self._mesh is not None:
            self._mesh.discard()

    def release(self, request: int) -> None:
        """Frees what the device holds for a request that ended; ignores unknown requests."""
        self.experts.finish(request)
        self._sampler.release(request)

    def _admit(self, sampling: Sampling) -> None:
        """Tells the sampler of new requests now: one that ends before the step is sampled is released."""
        for name, active in sampling:
            if not active.admitted:
                request = active.request
                self._sampler.admit(name, request.sampling, request.seed, request.prompt, request.written)
                active.admitted = True

    def _sample(self, logits_NV: Tensor, sampling: Sampling, allowed: Allowed | None) -> Sampled:
        sampled = self._sampler.sample(logits_NV, [name for name, _ in sampling], allowed)
        if self._fed is not None:
            self._fed.feed(sampled.tokens_B)
        return sampled


@dataclass(frozen=True)
class _Logits:
    """sampled_NV: of the rows that sample. scores: of the tokens of prompts; None: none are scored."""

    sampled_NV: Tensor
    scores: Logprobs | None = None


def _logits(logits_NV: Tensor, rows: Sequence[int], scored: Sequence[int], wanted: Sequence[Span]) -> _Logits:
    if not wanted:
        return _Logits(logits_NV)
    places_N = torch.tensor([bisect_left(scored, row) for row in rows], dtype=torch.int64)
    sampled_NV = logits_NV.index_select(0, to_device(places_N, logits_NV.device))
    return _Logits(sampled_NV, score_spans(logits_NV, scored, wanted))


class _Source(NamedTuple):
    """The step in flight that samples the last token of a chunk, and its row there; -1 if the host knows it.

    behind: of Segment.
    """

    row: int = -1
    flight: Flight[ActiveRequest] | None = None
    behind: int = 1


_KNOWN = _Source()


def _sources(chunks: Sequence[Chunk], flights: Flights) -> list[_Source]:
    """Where the tokens come from that the host does not know yet; finishes the steps that sample them."""
    places = [_place(chunk, flights) for chunk in chunks]
    last = max(places, default=-1)
    for flight in list(flights)[: last + 1]:
        flight.finish()
    newer, behind = 0, {}
    for place in range(len(flights) - 1, -1, -1):
        newer += flights[place].finished and bool(flights[place].sampling)
        behind[place] = newer
    return [
        _KNOWN if place < 0 else _Source(flights[place].rows[chunk.id], flights[place], behind[place])
        for place, chunk in zip(places, chunks, strict=True)
    ]


def _place(chunk: Chunk, flights: Flights) -> int:
    """The newest of `flights` that samples the last token of `chunk`; -1 if the host knows it."""
    if chunk.tokens[-1] != UNKNOWN_TOKEN:
        return -1
    return next(place for place in range(len(flights) - 1, -1, -1) if chunk.id in flights[place].rows)


def _fill_in(sources: Sequence[_Source], batch: Batch) -> None:
    """Inserts the tokens that the host does not know yet, from earlier steps, on the device."""
    unknown: dict[int, tuple[Flight[ActiveRequest], list[int], list[int]]] = {}
    for place, source in zip(batch.last_rows, sources, strict=True):
        if source.flight is not None:
            _, rows, places = unknown.setdefault(id(source.flight), (source.flight, [], []))
            rows.append(source.row)
            places.append(place)
    for flight, rows, places in unknown.values():
        flight.copy_tokens(rows, places, batch.tokens_T)
