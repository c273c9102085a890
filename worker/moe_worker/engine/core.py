"""The engine's steps: plan, launch, and the tokens of a finished step as text.

On a GPU the next step is planned and launched before the tokens of this one are known: they stay on the
device and feed the next step there, so the device hides the host's work. In a mesh of several stages, as many
steps are in flight as there are stages, each with its part of the streams (micro-batches): while one stage
computes a step, the one before computes the next.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshReport
from moe_worker.engine.active import ActiveRequest
from moe_worker.engine.flight import Flight
from moe_worker.engine.launching import Launcher
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.mesh_report import MeshReporter
from moe_worker.engine.requests import Delta, FinishReason, Load, Request
from moe_worker.engine.statistics import Event, ExpertStatistics, Statistics, Tally
from moe_worker.errors import DeviceMemoryError, RequestError
from moe_worker.kvcache.host import HostPages
from moe_worker.kvcache.paged import PagedCache
from moe_worker.kvcache.pinned import PinnedPages
from moe_worker.mesh.errors import MeshError, RankMemoryError
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models.memory import lack_of_memory
from moe_worker.sampling.guides import Guide
from moe_worker.sampling.text import TextStream
from moe_worker.scheduler.core import Scheduler
from moe_worker.scheduler.plan import Arrival, Counters, Limits, Step

log = logging.getLogger(__name__)
# The least streams of a micro-batch on GPUs, by format of weights, where a gain was measured: in bf16 with
# parts of 8, in W4A8 of 128 (docs/parallelism.md). The others were not measured; there streams stay together.
LEAST_STREAMS = {"bf16": 8, "w4a8": 128}


class EngineCore:
    """Runs requests on one loaded model. Not thread-safe.

    `clock` returns monotonic seconds; deadlines of requests use it. flights: concurrent steps; None: one for
    each micro-batch, and on a GPU one more. micro_batches: parts of the running streams; None: one for each
    stage of a mesh, but on GPUs only if it has LEAST_STREAMS.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: EngineOptions,
        clock: Callable[[], float] = time.monotonic,
        flights: int | None = None,
        micro_batches: int | None = None,
    ) -> None:
        self._loaded = loaded
        self._clock = clock
        self._host = _host_pages(loaded.cache, options.kv_offload)
        self._launcher = Launcher(loaded)
        self._micro_batches = micro_batches or self._launcher.stages
        least, parts = 1, self._micro_batches
        if self._launcher.ahead and micro_batches is None:
            least = LEAST_STREAMS.get(loaded.format, 1)
            parts = parts if loaded.format in LEAST_STREAMS else 1
        limits = _limits(loaded, options)
        self._scheduler = Scheduler(
            replace(
                limits, target_s=limits.target_s / parts, micro_batches=parts, least_streams=least,
                ahead=self._launcher.ahead,
            ),
            self._host,
        )  # fmt: skip
        self._active: dict[int, ActiveRequest] = {}
        self._tally = Tally()
        runner = loaded.runner
        self._mesh = MeshReporter.of(runner, options.mesh_epoch) if isinstance(runner, MeshRunner) else None
        self._flights: deque[Flight[ActiveRequest]] = deque()
        self._most_flights = flights or self._micro_batches + self._launcher.ahead

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._active and not self._flights

    @property
    def most_requests(self) -> int:
        """Requests that `submit` accepts at a time."""
        return self._scheduler.limits.requests

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._loaded.config.vocab_size

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
    def counters(self) -> Counters:
        """The counters of the scheduler so far."""
        return self._scheduler.counters

    @property
    def statistics(self) -> Statistics:
        """The counters so far."""
        scheduler = self._scheduler
        return self._tally.statistics(scheduler.counters, scheduler.evictions, scheduler.offloaded)

    @property
    def expert_statistics(self) -> ExpertStatistics:
        """The tokens of each expert so far. Waits for the device."""
        try:
            return self._expert_statistics()
        except MeshError as error:
            self._recover(error)
            return self._expert_statistics()

    def _expert_statistics(self) -> ExpertStatistics:
        found = self._launcher.experts.read()
        return found if self._mesh is None else self._mesh.with_ranks(found)

    @property
    def mesh_report(self) -> MeshReport | None:
        """The processes of this replica; None where it is one."""
        return None if self._mesh is None else self._mesh.report

    def take_events(self) -> tuple[Event, ...]:
        """Events of requests since the last call."""
        return self._tally.take_events()

    def take_block_changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Names of blocks that the cache holds now, and that it holds no more, since the last call."""
        return self._scheduler.take_block_changes()

    def open_guide(self, request: Request) -> Guide | None:
        """The guide of a request's output format, which is compiled in the background; None without one."""
        return self._launcher.guides.open(request)

    def submit(self, request: Request, guide: Guide | None = None) -> None:
        """Adds a checked request. Raises QueueFullError, and RequestError for what this engine cannot do.

        guide: of `open_guide`; steps wait until it is ready.
        """
        room, shard = self._loaded.context - len(request.prompt), self._idlest_shard()
        arrival = Arrival(
            id=request.id,
            prompt=request.prompt + request.written,
            max_new_tokens=min(request.sampling.max_tokens, room) - len(request.written),
            arrived=self._clock(),
            priority=request.priority,
            deadline=request.deadline,
            namespace=f"{request.salt} {shard}" if shard else request.salt,
            tenant=request.tenant,
            weight=request.weight,
            scored=request.scores_prompt,
            blocks=request.blocks,
            guided=request.output_format is not None,
        )
        if arrival.scored and self._launcher.feeds:
            raise RequestError(
                "sampling.prompt_logprobs",
                "sampling.prompt_logprobs is not supported by a replica of several GPU workers; leave it out",
            )
        self._scheduler.submit(arrival)
        ends = request.sampling.end_tokens(self._loaded.config.eos_token_ids)
        active = ActiveRequest(request, TextStream(request.sampling.stop), ends, shard)
        active.resume(self._loaded.tokenizer.token_bytes)
        active.guide = guide or self.open_guide(request)
        self._active[request.id] = active

    def _idlest_shard(self) -> int:
        """The shard with the fewest requests; a request stays where its pages are."""
        shards = self._loaded.shards
        live = Counter(active.shard for active in self._active.values()) if len(shards) > 1 else {}
        return min(shards, key=lambda shard: live.get(shard, 0))

    def cancel(self, request: int) -> None:
        """Removes a request and frees its resources; it is no error if it has finished already."""
        self._active.pop(request, None)
        self._launcher.release(request)
        self._scheduler.release(request)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Plans and launches a step, then waits for the oldest one; returns a token for each request that
        samples.

        Empty if there is nothing to do, or if more steps may be in flight than were launched before this one.
        """
        deltas = self._tend()
        plan = self._scheduler.plan(self._clock())
        if self._host is not None:
            self._host.run(self._scheduler.take_moves())
        if plan.preempted or plan.admitted:
            self._tally.note(plan, {id_: self._active[id_].tokens for id_ in plan.preempted})
        deltas += [self._end(request, FinishReason.DEADLINE) for request in plan.expired]
        if plan.step is not None:
            self._launch(plan.step)
        elif self._host is not None and not self._flights:
            self._host.wait()
        if self._flights and (plan.step is None or len(self._flights) == self._most_flights):
            deltas += self._land_oldest()
        return deltas

    def _tend(self) -> list[Delta]:
        """What a mesh does between two steps. Ranks come back while no step is in flight: none is lost."""
        runner, deltas = self._loaded.runner, list[Delta]()
        if not isinstance(runner, MeshRunner):
            return deltas
        while runner.member.returned and self._flights:
            deltas += self._land_oldest()
        try:
            runner.tend()
        except MeshError as error:
            self._recover(error)
        return deltas

    def _launch(self, step: Step) -> None:
        active = [self._active[chunk.id] for chunk in step.chunks]
        try:
            with lack_of_memory():
                flight = self._launcher.launch(step, active, self._flights)
        except torch.OutOfMemoryError as error:
            self._shrink(step, error)
            self._scheduler.retract(step, shrink=True)
            self._give_up()
        except MeshError as error:
            self._scheduler.retract(step, shrink=step.tokens >= _too_many(error))
            self._recover(error)
        else:
            self._flights.append(flight)
            self._finish(len(self._flights) - self._micro_batches + 1)

    def _finish(self, count: int) -> bool:
        """Samples the `count` oldest steps; False where that fails: those not sampled are undone then."""
        try:
            with lack_of_memory():
                for flight in list(self._flights)[: max(0, count)]:
                    flight.finish()
        except torch.OutOfMemoryError as error:
            self._shrink(self._flights[-1].step, error)
            self._give_up()
        except MeshError as error:
            self._recover(error)
        else:
            return True
        return False

    def _shrink(self, step: Step, error: torch.OutOfMemoryError) -> None:
        """Raises DeviceMemoryError where steps cannot become smaller than `step`."""
        alone = all(flight.step is step for flight in self._flights)
        if step.tokens == 1 and alone:
            raise _no_memory(str(self._loaded.device)) from error
        log.warning("out of memory in a step of %d tokens; going on with smaller ones", step.tokens)
        torch.cuda.empty_cache()

    def _give_up(self) -> None:
        """Undoes the steps that are not sampled yet; later ones are smaller."""
        self._retract(too_many=0)
        try:
            self._launcher.discard()
        except MeshError as error:
            self._recover(error)

    def _retract(self, too_many: float) -> None:
        """Undoes the steps in flight that are not sampled; those of `too_many` tokens do not fit."""
        while self._flights and not self._flights[-1].finished:
            step = self._flights.pop().step
            self._scheduler.retract(step, shrink=step.tokens >= too_many)

    def _undo(self, too_many: float) -> None:
        """As `_retract`, and sampled steps: what a GPU computes when a rank is lost means nothing."""
        self._retract(too_many)
        while self._flights:
            flight = self._flights.pop()
            self._scheduler.retract(flight.step, shrink=False)
            self._launcher.undo(flight)

    def _recover(self, error: MeshError) -> None:
        """Forms the mesh again; every running request is recomputed from its prompt and its tokens.

        Raises MeshError if that fails, DeviceMemoryError if a rank has no memory for a step of one token.
        """
        if not isinstance(self._loaded.runner, MeshRunner):
            raise error
        self._undo(_too_many(error))
        if isinstance(error, RankMemoryError):
            if error.tokens == 1:
                raise _no_memory(f"rank {error.rank}") from error
            log.warning("%s; going on with smaller steps", error)
        self._loaded.runner.reform(error)
        lost = self._scheduler.lose_cache()
        log.warning("the cache of the mesh is lost; %d requests are recomputed", len(lost))

    def _land_oldest(self) -> list[Delta]:
        """Nothing where the mesh has lost a rank, and the steps in flight."""
        if not self._finish(1):
            return []
        self._flights[0].arrive()
        runner = self._loaded.runner
        if isinstance(runner, MeshRunner) and runner.member.lost is not None:
            self._recover(runner.member.lost)
            return []
        return self._land(self._flights.popleft())

    def _land(self, flight: Flight[ActiveRequest]) -> list[Delta]:
        """Processes the tokens of a step; requests that ended since its launch get none of them."""
        self._launcher.guides.take(flight)
        self._scheduler.note_masks(self._launcher.guides.mask_seconds(flight))
        tokens, failed, logprobs = flight.wait()
        self._tally.count(flight.step, flight.decoded, len(flight.sampling))
        full = frozenset(self._scheduler.complete(flight.step, tokens, self._clock()))
        deltas, complete = self._scored(flight), flight.complete
        live, bytes_of = self._active, self._loaded.tokenizer.token_bytes
        for row, (request, active) in enumerate(flight.sampling):
            if live.get(request) is not active:
                continue
            if failed[row]:
                reason = FinishReason.FORMAT if active.too_complex else FinishReason.FAILED
                deltas.append(self._end(request, reason))
                continue
            token = tokens[row]
            text, ended = active.take(token, bytes_of(token), request in full, row in complete)
            if ended is not None:
                self.cancel(request)
            deltas.append(Delta(request, text, token, ended, logprobs.get(row)))
        return deltas

    def _scored(self, flight: Flight[ActiveRequest]) -> list[Delta]:
        """The log-probabilities of the prompts' tokens in a step."""
        deltas, scores = [], flight.scores()
        for span in flight.spans:
            own, scores = scores[: len(span.rows)], scores[len(span.rows) :]
            request = span.active.request.id
            if self._active.get(request) is span.active:
                deltas.append(Delta(request, "", None, prompt=span.take(own)))
        return deltas

    def _end(self, request: int, reason: FinishReason) -> Delta:
        """Ends a request without a token."""
        self.cancel(request)
        return Delta(request, "", None, reason)


def _host_pages(cache: PagedCache, memory: int) -> HostPages | PinnedPages | None:
    """CPU memory for evicted pages; None for 0 bytes."""
    if not memory:
        return None
    return PinnedPages(cache, memory) if cache.device.type == "cuda" else HostPages(cache, memory)


def _too_many(error: MeshError) -> float:
    """Tokens of a step for which a rank has no memory."""
    return error.tokens if isinstance(error, RankMemoryError) else math.inf


def _no_memory(who: str) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"{who} has no memory left for a step of one token; lower the KV memory, or use a smaller format"
    )


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
