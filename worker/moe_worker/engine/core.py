"""One step of the engine: plan, forward pass, sampling, and conversion of tokens to text.

On a GPU the next step is planned and launched before the tokens of this one are known: they stay on the
device and feed the next step there, so the device hides the host's work.
"""

import logging
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.flight import Flight
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Delta, FinishReason, Load, Request
from moe_worker.engine.statistics import (
    DomainExperts,
    Event,
    ExpertStatistics,
    LayerExperts,
    Statistics,
    Tally,
)
from moe_worker.errors import DeviceMemoryError
from moe_worker.mesh.control import MeshError
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.runner import TellsChoices
from moe_worker.sampling.guides import Allowed, Guide, Guides
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.sampler import Sampled, Sampler
from moe_worker.sampling.text import TextStream
from moe_worker.scheduler.core import Scheduler
from moe_worker.scheduler.plan import UNKNOWN_TOKEN, Arrival, Chunk, Counters, Limits, Step

log = logging.getLogger(__name__)


@dataclass
class _Sequence:
    """An active request; `pages` is its page table. admitted: whether the sampler knows it.

    generated: tokens of its text, including emitted tokens of a resumed stream. shard: where its pages are.
    guide: of its output format; None: any text will do.
    """

    request: Request
    text: TextStream
    ends: frozenset[int]
    shard: int = 0
    pages: "array[int]" = field(default_factory=lambda: array("i"))
    generated: int = 0
    admitted: bool = False
    guide: Guide | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of the text so far."""
        return len(self.request.prompt) + self.generated

    @property
    def given(self) -> int:
        """Tokens of the prompt and of a resumed stream."""
        return len(self.request.prompt) + len(self.request.written)

    def follow(self, chunk: Chunk, source: int) -> Segment:
        """The model's input for `chunk`. source: of Segment."""
        if chunk.pages:
            self.pages[chunk.pages_from :] = array("i", chunk.pages)
        return Segment(chunk.tokens, chunk.start, self.pages, self.shard, source)


class EngineCore:
    """Runs requests on one loaded model. Not thread-safe.

    `clock` returns monotonic seconds; deadlines of requests use it. flights: concurrent steps; None: two on a
    GPU, one elsewhere.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: EngineOptions,
        clock: Callable[[], float] = time.monotonic,
        flights: int | None = None,
    ) -> None:
        self._loaded = loaded
        self._clock = clock
        self._scheduler = Scheduler(_limits(loaded, options))
        self._sequences: dict[int, _Sequence] = {}
        self._sampler = Sampler(loaded.config.vocab_size, loaded.device, loaded.config.eos_token_ids)
        self._guides = Guides(
            loaded.tokenizer,
            loaded.config.vocab_size,
            loaded.config.eos_token_ids,
            threads=torch.get_num_threads(),
        )
        self._experts = loaded.runner.expert_counter()
        self._tally = Tally()
        self._flights: deque[Flight[_Sequence]] = deque()
        runner = loaded.runner
        self._fed = runner if isinstance(runner, MeshRunner) and runner.feeds else None
        ahead = loaded.device.type == "cuda" and (loaded.member is None or self._fed is not None)
        self._most_flights = flights or (2 if ahead else 1)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._sequences and not self._flights

    @property
    def most_requests(self) -> int:
        """Requests that `submit` accepts at a time."""
        return self._scheduler.limits.requests

    @property
    def load(self) -> Load:
        """The current load of the engine."""
        scheduler = self._scheduler
        return Load(
            queued=scheduler.waiting,
            running=scheduler.running,
            kv_tokens_capacity=scheduler.limits.tokens,
            kv_tokens_used=scheduler.used_pages * scheduler.limits.page_size,
            kv_tokens_cached=scheduler.cached_pages * scheduler.limits.page_size,
        )

    @property
    def statistics(self) -> Statistics:
        """The counters so far."""
        return self._tally.statistics(self._scheduler.counters, self._scheduler.evictions)

    @property
    def expert_statistics(self) -> ExpertStatistics:
        """The tokens of each expert so far. Waits for the device."""
        try:
            steps, layers = self._experts.read()
        except MeshError as error:
            self._recover(error)
            steps, layers = self._experts.read()
        rows = tuple(LayerExperts(layer, tuple(tokens), active) for layer, tokens, active in layers)
        learner = self._loaded.learner
        if learner is None:
            return ExpertStatistics(steps, rows)
        matrix = learner.matrix
        named = zip(learner.names, matrix.tokens_N, matrix.affinity().unbind(1), strict=True)
        domains = tuple(
            DomainExperts(name, tokens, tuple(map(tuple, shares_LE.tolist())))
            for name, tokens, shares_LE in named
        )
        return ExpertStatistics(steps, rows, domains, matrix.fit())

    def take_events(self) -> tuple[Event, ...]:
        """Events of requests since the last call."""
        return self._tally.take_events()

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._loaded.config.vocab_size

    @property
    def counters(self) -> Counters:
        """The counters of the scheduler so far."""
        return self._scheduler.counters

    def submit(self, request: Request) -> None:
        """Adds a checked request. Raises QueueFullError."""
        room, shard = self._loaded.context - len(request.prompt), self._idlest_shard()
        arrival = Arrival(
            id=request.id,
            prompt=request.prompt + request.written,
            max_new_tokens=min(request.sampling.max_tokens, room) - len(request.written),
            arrived=self._clock(),
            priority=request.priority,
            deadline=request.deadline,
            namespace=f"shard {shard}" if shard else "",
        )
        self._scheduler.submit(arrival)
        ends = request.sampling.end_tokens(self._loaded.config.eos_token_ids)
        text = TextStream(request.sampling.stop)
        for token in request.written:
            text.push(self._loaded.tokenizer.token_bytes(token))  # has been sent
        sequence = _Sequence(request, text, ends, shard, generated=len(request.written))
        if request.output_format is not None:
            sequence.guide = self._guides.open(request.output_format, request.written)
        self._sequences[request.id] = sequence

    def _idlest_shard(self) -> int:
        """That with the fewest sequences; a sequence stays where its pages are."""
        if self._loaded.shards == 1:
            return 0
        live = Counter(sequence.shard for sequence in self._sequences.values())
        return min(range(self._loaded.shards), key=lambda shard: live[shard])

    def cancel(self, request: int) -> None:
        """Removes a request and frees its resources; it is no error if it has finished already."""
        self._sequences.pop(request, None)
        if self._loaded.learner is not None:
            self._loaded.learner.finish(request)
        self._sampler.release(request)
        self._scheduler.release(request)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Plans and launches a step, then waits for the oldest one; returns a token for each sequence that
        samples.

        Empty if there is nothing to do, or, on a GPU, if nothing was launched before this step.
        """
        plan = self._scheduler.plan(self._clock())
        if plan.preempted or plan.admitted:
            self._tally.note(plan, {id_: self._sequences[id_].tokens for id_ in plan.preempted})
        deltas = [self._expire(request) for request in plan.expired]
        if plan.step is not None:
            self._launch(plan.step)
        if self._flights and (plan.step is None or len(self._flights) == self._most_flights):
            deltas += self._land(self._flights.popleft())
        return deltas

    def _launch(self, step: Step) -> None:
        try:
            self._flights.append(self._compute(step))
        except torch.OutOfMemoryError as error:
            if step.tokens == 1 and not self._flights:
                raise DeviceMemoryError(
                    f"{self._loaded.device} has no memory left for a step of one token; lower the KV memory, "
                    "or use a smaller format"
                ) from error
            log.warning("out of memory in a step of %d tokens; going on with smaller ones", step.tokens)
            torch.cuda.empty_cache()
            self._scheduler.retract(step, shrink=True)
            return
        except MeshError as error:
            self._scheduler.retract(step, shrink=False)
            self._recover(error)
            return
        self._tally.count(step, {chunk.id: self._sequences[chunk.id].given for chunk in step.chunks})

    def _recover(self, error: MeshError) -> None:
        """Forms the mesh again; every running request is computed anew from the tokens that it has.

        Raises MeshError where that fails.
        """
        if not isinstance(self._loaded.runner, MeshRunner):
            raise error
        self._loaded.runner.reform(error)
        lost = self._scheduler.lose_cache()
        log.warning("%d requests go on from the tokens that they have", len(lost))

    def _land(self, flight: "Flight[_Sequence]") -> list[Delta]:
        """Processes the tokens of a step; requests that ended since its launch get none of them."""
        self._guide(flight)
        tokens, failed, logprobs = flight.wait()
        full = frozenset(self._scheduler.complete(flight.step, tokens, self._clock()))
        deltas = []
        for row, (request, sequence) in enumerate(flight.sampling):
            if self._sequences.get(request) is not sequence:
                continue
            if failed[row]:
                deltas.append(self._fail(request))
            else:
                deltas.append(self._advance(request, tokens[row], request in full, logprobs.get(row)))
        return deltas

    def _compute(self, step: Step) -> "Flight[_Sequence]":
        """Launches a step; nothing here waits for the device."""
        loaded = self._loaded
        sources = [self._source(chunk) for chunk in step.chunks]
        segments = [
            self._sequences[chunk.id].follow(chunk, source)
            for chunk, source in zip(step.chunks, sources, strict=True)
        ]
        batch = Batch.of(segments, loaded.cache)
        self._fill_in(sources, batch)
        rows = [row for row, chunk in zip(batch.last_rows, step.chunks, strict=True) if chunk.samples]
        sampling = [(chunk.id, self._sequences[chunk.id]) for chunk in step.chunks if chunk.samples]
        guided = [(row, it.guide) for row, (_, it) in enumerate(sampling) if it.guide is not None]
        masks = None if self._flights else self._guides.begin(guided, loaded.device)
        logits_NV = loaded.runner.logits(batch, loaded.cache, rows)
        self._experts.count(step.tokens)
        if loaded.learner is not None and isinstance(loaded.runner, TellsChoices):
            chunks = ((chunk.id, len(chunk.tokens)) for chunk in step.chunks)
            loaded.learner.take(loaded.runner.choices(), chunks)
        if not sampling:
            return Flight(step, sampling, None)
        if guided:
            # Masks depend on the last tokens; where those are under way, this step is already launched.
            for flight in self._flights:
                self._guide(flight)
        masks = masks or self._guides.begin(guided, loaded.device)
        sampled = self._sample(logits_NV, sampling, masks())
        if self._fed is not None:
            self._fed.feed(sampled.tokens_B)
        return Flight(step, sampling, sampled)

    def _guide(self, flight: "Flight[_Sequence]") -> None:
        """Gives the tokens of a step to the guides of their texts, once."""
        if flight.guided or all(sequence.guide is None for _, sequence in flight.sampling):
            return
        flight.guided = True
        tokens, failed, _ = flight.wait()
        for (_, sequence), token, wrong in zip(flight.sampling, tokens, failed, strict=True):
            if sequence.guide is not None and not wrong:
                sequence.guide.take(token, self._loaded.tokenizer.token_bytes(token))

    def _source(self, chunk: Chunk) -> int:
        """The row of the previous step that samples the last token of `chunk`; -1 where the host knows it."""
        return self._flights[-1].row(chunk.id) if chunk.tokens[-1] == UNKNOWN_TOKEN else -1

    def _fill_in(self, sources: Sequence[int], batch: Batch) -> None:
        """Inserts the tokens that the host does not know yet, from the previous step, on the device."""
        unknown = [(row, source) for row, source in zip(batch.last_rows, sources, strict=True) if source >= 0]
        if unknown and self._fed is None:
            self._flights[-1].copy_tokens(
                [source for _, source in unknown], [row for row, _ in unknown], batch.tokens_T
            )

    def _sample(
        self, logits_NV: torch.Tensor, sampling: Sequence[tuple[int, _Sequence]], allowed: Allowed | None
    ) -> Sampled:
        for name, sequence in sampling:
            if not sequence.admitted:
                request = sequence.request
                self._sampler.admit(name, request.sampling, request.seed, request.prompt, request.written)
                sequence.admitted = True
        return self._sampler.sample(logits_NV, [name for name, _ in sampling], allowed)

    def _advance(self, request: int, token: int, full: bool, logprobs: TokenLogprobs | None) -> Delta:
        sequence = self._sequences[request]
        sequence.generated += 1
        ended = token in sequence.ends
        text = "" if ended else sequence.text.push(self._loaded.tokenizer.token_bytes(token))
        stopped = ended or sequence.text.stopped or (sequence.guide is not None and sequence.guide.complete)
        if not (stopped or full):
            return Delta(request, text, token, None, logprobs)
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        self.cancel(request)
        return Delta(request, text + sequence.text.finish(), token, reason, logprobs)

    def _fail(self, request: int) -> Delta:
        guide = self._sequences[request].guide
        too_complex = guide is not None and guide.failed
        self.cancel(request)
        return Delta(request, "", None, FinishReason.FORMAT if too_complex else FinishReason.FAILED)

    def _expire(self, request: int) -> Delta:
        self.cancel(request)
        return Delta(request, "", None, FinishReason.DEADLINE)


def _limits(loaded: LoadedModel, options: EngineOptions) -> Limits:
    return Limits(
        sequences=options.max_batch_size,
        waiting=options.max_queue,
        pages=loaded.cache.pages,
        page_size=loaded.cache.page_size,
        prefill_tokens=options.prefill_tokens,
        target_s=options.target_step_ms / 1000,
        prefix_cache=options.prefix_cache,
    )
