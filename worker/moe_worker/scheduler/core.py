"""Continuous batching over a paged cache: plans and completes the steps of all requests."""

from collections import deque
from collections.abc import Mapping, Sequence

from moe_worker.errors import QueueFullError
from moe_worker.kvcache.heap import LazyHeap
from moe_worker.kvcache.offload import Move, Storage
from moe_worker.scheduler.budget import TokenBudget
from moe_worker.scheduler.job import Job, State
from moe_worker.scheduler.plan import Arrival, Counters, Limits, Plan, Step, check
from moe_worker.scheduler.policy import Draft, SchedulingPolicy
from moe_worker.scheduler.rate import EndRate


class Scheduler:
    """Plans steps. Not thread-safe; the caller supplies the time.

    With `storage`, pages that are evicted are kept there: run `take_moves` after each plan, before its step.

    Step n + 1 may be planned before the tokens of step n are known. Steps complete in the order in which
    they were planned, and must run in that order too: the later one may reuse a page that was freed between
    two plans while the earlier one still runs.
    """

    def __init__(self, limits: Limits, storage: Storage | None = None) -> None:
        self.limits = limits
        self.counters = Counters()
        self._policy = SchedulingPolicy(limits, self.counters, storage)
        self._live: dict[int, Job] = {}
        self._deadlines: LazyHeap[float, Job] = LazyHeap(lambda _, job: job.state is not State.ENDED)
        self._flights: deque[tuple[Step, list[Job]]] = deque()
        self._end_rate = EndRate()
        self._now = self._completed = float("-inf")

    @property
    def budget(self) -> TokenBudget:
        """Tokens of a step, and the estimate of its time that they come from."""
        return self._policy.budget

    @property
    def waiting(self) -> int:
        """Waiting requests, including preempted ones."""
        return len(self._live) - len(self._policy.running)

    @property
    def running(self) -> int:
        """Requests that hold pages."""
        return len(self._policy.running)

    @property
    def idle(self) -> bool:
        """Whether there is neither a request nor a step in flight."""
        return not self._live and not self._flights

    @property
    def free_pages(self) -> int:
        """Free pages."""
        return self._policy.memory.pool.free

    @property
    def cached_pages(self) -> int:
        """Pages of idle prefixes."""
        return self._policy.memory.tree.idle

    @property
    def used_pages(self) -> int:
        """Pages of running requests; a page that several share counts once."""
        return self.limits.pages - self._policy.memory.available

    @property
    def evictions(self) -> int:
        """Pages evicted from the prefix tree since the start."""
        return self._policy.memory.tree.evictions

    @property
    def offloaded(self) -> tuple[int, int]:
        """Pages that were kept in CPU memory when they were evicted, and pages that came back, so far."""
        offload = self._policy.memory.offload
        return (0, 0) if offload is None else (offload.saved, offload.restored)

    def take_moves(self) -> list[Move]:
        """Copies of pages for the last plan; they run before its step, also if it has none."""
        return self._policy.memory.take_moves()

    def take_block_changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Names of blocks that came into the cache, or are about to, and of those that went, since the last
        call.
        """
        return self._policy.memory.tree.names.take()

    def submit(self, arrival: Arrival) -> None:
        """Adds a request to the queue.

        Raises RequestError if it can never run, QueueFullError if too many wait, and ValueError if a request
        with the same id is live.
        """
        check(arrival, self.limits)
        if arrival.id in self._live:
            raise ValueError(f"request {arrival.id} is live already; ids must be unique")
        self._now = max(self._now, arrival.arrived)
        self._end_rate.start(self._now)
        if len(self._live) >= self.limits.requests:
            raise QueueFullError(
                f"the queue is full ({self.waiting} requests wait, {self.running} run); try again",
                self._end_rate.delay_s(self._now),
            )
        job = self._live[arrival.id] = self._policy.add(arrival)
        if arrival.deadline is not None:
            self._deadlines.push(arrival.deadline, job)

    def plan(self, now: float) -> Plan:
        """The next step. Every running stream gets a token in it; prompts use the rest of the budget."""
        self._now = max(self._now, now)
        expired = self._expire()
        draft = self._policy.draft(self.counters.steps + 1)
        return Plan(self._launch(draft), expired, tuple(draft.preempted), tuple(draft.admitted))

    def note_masks(self, seconds: Mapping[int, float]) -> None:
        """What masks of requests took since the last call; steps hold fewer of those that delay others."""
        for request, took in seconds.items():
            job = self._live.get(request)
            if job is not None:
                self._policy.note_mask(job, took)

    def complete(self, step: Step, tokens: Sequence[int], now: float) -> tuple[int, ...]:
        """Completes a step with its sampled tokens: one for each chunk that samples, in order.

        Tokens of requests released meanwhile are ignored. Returns the requests that now have all their
        tokens; they are released. Raises ValueError if the step is not the oldest in flight, or the number of
        tokens is wrong.
        """
        if not self._flights or self._flights[0][0] is not step:
            raise ValueError(f"step {step.number} is not the oldest one in flight")
        if len(tokens) != [chunk.samples for chunk in step.chunks].count(True):
            raise ValueError(f"step {step.number} does not sample {len(tokens)} tokens")
        jobs = self._flights.popleft()[1]
        self._now = max(self._now, now)
        took = max(0.0, now - max(step.planned, self._completed))
        self.budget.observe(step.tokens, len(step.chunks), took)
        self._completed = now
        finished = self._advance(step, jobs, tokens)
        for job in finished:
            self._end(job)
        return tuple(job.arrival.id for job in finished)

    def retract(self, step: Step, *, shrink: bool) -> None:
        """Reverts the newest step, which did not run. `shrink`: it was too large for the device's memory.

        Later steps then have at most half as many prompt tokens, or, if this one had none, half as many
        streams: of each micro-batch, where streams are divided. Raises ValueError if it is not the newest
        step in flight.
        """
        if not self._flights or self._flights[-1][0] is not step:
            raise ValueError(f"step {step.number} is not the newest one in flight")
        jobs = self._flights.pop()[1]
        for chunk, job in zip(step.chunks, jobs, strict=True):
            if job.state is not State.ENDED:
                job.undo(chunk, step.number)
        if shrink and step.tokens > len(step.chunks):
            self.budget.shrink(step.tokens // 2)
        elif shrink:
            self._policy.lower(len(step.chunks) // 2)

    def lose_cache(self) -> tuple[int, ...]:
        """Nothing that was in the cache is there any more: running requests are preempted, and returned.

        Raises ValueError with a step in flight.
        """
        if self._flights:
            raise ValueError(f"step {self._flights[0][0].number} is in flight")
        return self._policy.lose_cache()

    def release(self, request: int) -> None:
        """Removes a request that has finished or was cancelled; its pages are free at once. Idempotent."""
        job = self._live.get(request)
        if job is not None:
            self._end(job)

    def _expire(self) -> tuple[int, ...]:
        expired = []
        while (first := self._deadlines.peek()) is not None and first[0] <= self._now:
            self._end(first[1])
            expired.append(first[1].arrival.id)
        self.counters.expired += len(expired)
        return tuple(expired)

    def _launch(self, draft: Draft) -> Step | None:
        chunks = draft.single + draft.long
        if not chunks:
            return None
        self.counters.steps = draft.number
        tokens = len(draft.single) + sum(len(chunk.tokens) for chunk in draft.long)
        step = Step(draft.number, self._now, chunks, tokens)
        self._flights.append((step, draft.single_jobs + draft.long_jobs))
        return step

    def _advance(self, step: Step, jobs: list[Job], tokens: Sequence[int]) -> list[Job]:
        """Adds the tokens to the jobs, and full pages to the prefix tree; returns the jobs that are done."""
        values, size, done = iter(tokens), self.limits.page_size, []
        number, running, ended = step.number, State.RUNNING, State.ENDED
        for (_, start, given, samples, _, _), job in zip(step.chunks, jobs, strict=True):
            token = next(values) if samples else None
            if job.state is ended:
                continue
            if token is not None:
                job.tokens.append(token)
            # A job that was preempted since has other pages now, or none.
            if job.state is running and job.admitted <= number:
                job.written = written = start + len(given)
                if written >= (job.shared + 1) * size:
                    self._policy.memory.share(job)
            if len(job.tokens) == job.ends:
                done.append(job)
        return done

    def _end(self, job: Job) -> None:
        self._policy.end(job)
        del self._live[job.arrival.id]
        self._end_rate.count(self._now)
