"""Launches steps: builds the batch, computes the forward pass, and samples; on a GPU the host does not wait.

In a mesh of several stages, a launch computes the first one; the step is sampled when it is finished, which
needs the last stage. Until then the first one can compute other steps.

Legend: N rows that sample, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moe_worker.engine.active import ActiveRequest
from moe_worker.engine.expert_usage import ExpertUsage
from moe_worker.engine.flight import Flight, Outcome
from moe_worker.engine.guiding import Flights, Sampling, StepGuides
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.scoring import Span, score_spans, spans
from moe_worker.engine.statistics import decode_tokens
from moe_worker.kernels.likeliest import Likeliest
from moe_worker.kernels.transfer import to_device
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models.batch import Batch, Fed, Segment
from moe_worker.models.runner import FindsLikeliest
from moe_worker.sampling.guides import Allowed
from moe_worker.sampling.remote import Draw
from moe_worker.sampling.sampler import Logprobs, Sampled, Sampler, with_drawn
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
        self._finds = runner if isinstance(runner, FindsLikeliest) else None
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
        chunks = step.chunks
        batch = self._batch(chunks, active, flights)
        rows = [row for row, chunk in zip(batch.last_rows, chunks, strict=True) if chunk.samples]
        sampling = [(chunk.id, each) for chunk, each in zip(chunks, active, strict=True) if chunk.samples]
        self._admit(sampling)
        draws = self._draws(rows, sampling)
        here = (
            [each for row, each in zip(rows, sampling, strict=True) if row not in draws]
            if draws
            else sampling
        )
        masks = self.guides.begin(here, flights, now=self._mesh is None and not self.ahead)
        wanted = spans(chunks, active)
        logits = self._begin(batch, rows, draws, wanted)
        self.experts.count(step)

        def outcome() -> Outcome:
            allowed = None if self.ahead else masks()  # the last stage of a mesh computes meanwhile
            found = logits()
            if self.ahead:
                allowed = masks()
            sampled = self._sample(found, here, allowed) if here else None
            if draws and found.drawn_D is not None:
                drawn = [place for place, row in enumerate(rows) if row in draws]
                self._sampler.note_drawn(sampling[place][0] for place in drawn)
                sampled = with_drawn(sampled, found.drawn_D, drawn)
            return sampled, found.scores

        decoded = decode_tokens(chunks, [each.given for each in active])
        return Flight(step, sampling, outcome, wanted, decoded)

    def _batch(self, chunks: Sequence[Chunk], active: Sequence[ActiveRequest], flights: Flights) -> Batch:
        """The input of a step; finishes the steps that sample tokens of it."""
        sources = _sources(chunks, flights)
        for flight in list(flights)[: sources[0].place + 1 if sources else 0]:
            flight.finish()
        segments = [each.follow(chunk) for each, chunk in zip(active, chunks, strict=True)]
        if self._fed is not None:
            _name_sources(segments, sources, flights)
            return Batch.of(segments, self._cache)
        ends = list(accumulate([len(chunk.tokens) for chunk in chunks]))
        fed = [
            Fed(flights[source.place].tokens_B, source.rows, [ends[number] - 1 for number in source.chunks])
            for source in sources
        ]
        return Batch.of(segments, self._cache, fed)

    def _draws(self, rows: Sequence[int], sampling: Sampling) -> dict[int, Draw]:
        """How the last stage of a mesh draws the tokens of some rows; all others are sampled here."""
        if self._mesh is None or self.feeds or self.ahead:
            return {}
        found = {}
        for row, (name, active) in zip(rows, sampling, strict=True):
            if active.guide is None and not active.request.scores_prompt:
                found[row] = self._sampler.next_draw(name)
        return {row: draw for row, draw in found.items() if draw is not None}

    def _begin(
        self, batch: Batch, rows: Sequence[int], draws: Mapping[int, Draw], wanted: Sequence[Span]
    ) -> "Callable[[], _Logits]":
        """Begins the forward pass. rows: that sample. draws: of those that the last stage draws."""
        scored = sorted({*rows, *(row for span in wanted for row in span.rows)}) if wanted else rows
        if self._mesh is None:
            logits_NV = self._runner.logits(batch, self._cache, scored)
            known = None if self._finds is None or wanted else self._finds.likeliest()
            return lambda: _logits(logits_NV, rows, scored, wanted, known)
        collect = self._mesh.begin(batch, self._cache, scored, [draws.get(row) for row in batch.last_rows])
        here, kept = ([row for row in each if row not in draws] for each in (rows, scored))

        def collected() -> _Logits:
            logits_NV, drawn_D = collect()
            return _logits(logits_NV, here, kept, wanted)._replace(drawn_D=drawn_D)

        return collected

    def discard(self) -> None:
        """Forgets the steps that are not finished; what other ranks computed of them is received."""
        if self._mesh is not None:
            self._mesh.discard()

    def undo(self, flight: Flight[ActiveRequest]) -> None:
        """A step that was launched does not count, though it may have been sampled."""
        if flight.finished:
            for _, active in flight.sampling:
                active.admitted = False
        self.guides.undo(flight)

    def release(self, request: int) -> None:
        """Frees what the device holds for a request that ended; ignores unknown requests."""
        self.experts.finish(request)
        self._sampler.release(request)

    def _admit(self, sampling: Sampling) -> None:
        """Tells the sampler of new requests now: one that ends before the step is sampled is released."""
        for name, active in sampling:
            if not active.admitted:
                request = active.request
                self._sampler.admit(name, request.sampling, request.seed, request.prompt, active.output)
                active.admitted = True

    def _sample(self, found: "_Logits", sampling: Sampling, allowed: Allowed | None) -> Sampled:
        names = [name for name, _ in sampling]
        sampled = self._sampler.sample(found.sampled_NV, names, allowed, found.known)
        if self._fed is not None:
            self._fed.feed(sampled.tokens_B)
        return sampled


class _Logits(NamedTuple):
    """sampled_NV: of the rows that are sampled here. scores: of the tokens of prompts; None: none are scored.

    known: the likeliest tokens of `sampled_NV`, where the runner knows them. drawn_D: int64, the tokens that
    the last stage of a mesh has drawn for the other rows.
    """

    sampled_NV: Tensor
    scores: Logprobs | None = None
    known: Likeliest | None = None
    drawn_D: Tensor | None = None


def _logits(
    logits_NV: Tensor, rows: Sequence[int], scored: Sequence[int], wanted: Sequence[Span],
    known: Likeliest | None = None,
) -> _Logits:  # fmt: skip
    if not wanted:
        return _Logits(logits_NV, known=known)
    places_N = torch.tensor([bisect_left(scored, row) for row in rows], dtype=torch.int64)
    sampled_NV = logits_NV.index_select(0, to_device(places_N, logits_NV.device))
    return _Logits(sampled_NV, score_spans(logits_NV, scored, wanted))


class _Source(NamedTuple):
    """A step in flight, by its place, that samples the last tokens of `chunks`, in its rows `rows`."""

    place: int
    chunks: list[int]
    rows: list[int]


def _sources(chunks: Sequence[Chunk], flights: Flights) -> list[_Source]:
    """Where the tokens come from that the host does not know yet: of each chunk the newest step that samples
    it; the newest step first.
    """
    sources = []
    unknown = [number for number, chunk in enumerate(chunks) if chunk.tokens[-1] == UNKNOWN_TOKEN]
    for place in range(len(flights) - 1, -1, -1):
        rows = flights[place].rows
        found = [number for number in unknown if chunks[number].id in rows]
        if found:
            sources.append(_Source(place, found, [rows[chunks[number].id] for number in found]))
            unknown = [number for number in unknown if chunks[number].id not in rows]
    if unknown:
        raise ValueError(f"no step in flight samples the last token of request {chunks[unknown[0]].id}")
    return sources


def _name_sources(segments: list[Segment], sources: Sequence[_Source], flights: Flights) -> None:
    """Tells the ranks of a mesh, which have the sampled tokens of the newest steps, whose they take."""
    behind = 0
    for place in range(len(flights) - 1, -1, -1):
        behind += flights[place].finished and bool(flights[place].sampling)
        for source in sources:
            if source.place == place:
                for number, row in zip(source.chunks, source.rows, strict=True):
                    segments[number] = segments[number]._replace(source=row, behind=behind)
