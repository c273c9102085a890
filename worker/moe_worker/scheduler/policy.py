"""The scheduling policy: which requests run, which wait, and how many tokens each gets in a step.

The order is fixed when a request arrives: its arrival time minus aging_s for each level of priority. So a
higher priority is served first among requests of about the same time, and a lower one once it has waited
aging_s longer for each level between them. Two requests never change places, so no request is preempted
forever. Waiting requests start strictly in this order. When pages run out, after the idle ones of the prefix
tree are evicted, the lowest-priority request is preempted.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from moe_worker.kvcache.heap import LazyHeap
from moe_worker.scheduler.budget import TokenBudget
from moe_worker.scheduler.job import Job, State
from moe_worker.scheduler.memory import Memory
from moe_worker.scheduler.plan import Admitted, Arrival, Chunk, Counters, Limits


@dataclass
class Draft:
    """The step under construction: chunks of one token and longer ones, each with its job."""

    number: int
    single: list[Chunk] = field(default_factory=list)
    single_jobs: list[Job] = field(default_factory=list)
    long: list[Chunk] = field(default_factory=list)
    long_jobs: list[Job] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    admitted: list[Admitted] = field(default_factory=list)


class SchedulingPolicy:
    """Jobs in scheduling order, and their pages."""

    def __init__(self, limits: Limits, counters: Counters) -> None:
        self.budget = TokenBudget(limits)
        self.memory = Memory(limits)
        self.running: list[Job] = []  # in scheduling order
        self.most_running = limits.sequences
        self._limits = limits
        self._counters = counters
        self._waiting: LazyHeap[tuple[float, int], Job] = LazyHeap(lambda _, job: job.state is State.WAITING)
        self._short: tuple[Job, int] | None = None  # the queued job that lacked pages, and how many it needs
        self._arrivals = 0

    def add(self, arrival: Arrival) -> Job:
        """Inserts a new request into the queue."""
        self._arrivals += 1
        job = Job(arrival, (arrival.arrived - self._limits.aging_s * arrival.priority, self._arrivals))
        self._waiting.push(job.rank, job)
        return job

    def end(self, job: Job) -> None:
        """Ends a job in any state; its pages are free."""
        if job.state is State.RUNNING:
            del self.running[bisect_left(self.running, job.rank, key=_rank)]
        self.memory.free(job)
        job.state = State.ENDED

    def lose_cache(self) -> tuple[int, ...]:
        """Preempts every running job, and forgets all prefixes."""
        draft = Draft(0)
        while self.running:
            self._preempt(draft)
        self.memory.tree.evict(self.memory.tree.idle)
        return tuple(draft.preempted)

    def draft(self, number: int) -> Draft:
        """Step `number`. Every running stream gets a token in it; prompts use the rest of the budget."""
        draft = Draft(number)
        while len(self.running) > self.most_running:
            self._preempt(draft)
        self._prefill(draft, self._decode(draft))
        return draft

    def _decode(self, draft: Draft) -> list[Job]:
        """Plans every job with one token to compute; returns those with more.

        The list is in scheduling order, so a job that is preempted for another one has not been planned yet:
        it is removed from the end of the list, which the loop then does not reach.
        """
        prompts: list[Job] = []
        single, jobs, number, size = draft.single, draft.single_jobs, draft.number, self._limits.page_size
        for job in self.running:
            position, length = job.computed, job.length
            if length - position > 1:
                prompts.append(job)
            elif length < job.ends and (position < len(job.table) * size or self._grow(draft, job)):
                single.append(job.next_token())
                jobs.append(job)
                if job.sampled + 1 == number:
                    job.sampled = number
                else:
                    self._count_gap(job, number)
        return prompts

    def _grow(self, draft: Draft, job: Job) -> bool:
        """One more page for a job; if none is free, lowest-priority jobs are preempted, finally this one."""
        while not self.memory.grow(job):
            if self._preempt(draft) is job:
                return False
        return True

    def _preempt(self, draft: Draft) -> Job:
        job = self.running.pop()
        self.memory.free(job)
        job.state, job.preempted = State.WAITING, True
        self._waiting.push(job.rank, job)
        draft.preempted.append(job.arrival.id)
        self._counters.preemptions += 1
        return job

    def _prefill(self, draft: Draft, prompts: list[Job]) -> None:
        """Distributes the prompt budget over running jobs and those that may start, in scheduling order."""
        budget = self.budget.prompt_tokens(len(draft.single))
        prompts.reverse()
        open_ = True
        while budget and (open_ or prompts):
            first = self._waiting.peek() if open_ else None
            if first is not None and (not prompts or first[0] < prompts[-1].rank):
                job = first[1]
                open_ = self._admit(draft, job)
                if not open_:
                    continue
            elif prompts:
                job = prompts.pop()
            else:
                return
            count = min(budget, job.left)
            self._place(draft, job, count)
            budget -= count

    def _admit(self, draft: Draft, job: Job) -> bool:
        """Whether the first job of the queue can start; no other job overtakes it, so that none waits
        forever.
        """
        running, memory = len(self.running), self.memory
        if running >= min(self.most_running, self.budget.tokens) or not job.known:
            return False
        # Each running job may soon need a page; without a reserve the new one would soon be preempted.
        if self._short is not None and self._short[0] is job and memory.available < self._short[1] + running:
            return False
        needed = memory.missing(job, reserve=running)
        if needed:
            self._short = (job, needed)
            return False
        self._short = None
        self._waiting.pop()
        job.state, job.admitted = State.RUNNING, draft.number
        insort(self.running, job, key=_rank)
        draft.admitted.append(Admitted(job.arrival.id, job.computed))
        self._count_admission(job)
        return True

    def _place(self, draft: Draft, job: Job, count: int) -> None:
        chunk = job.chunk(count)
        (draft.single if count == 1 else draft.long).append(chunk)
        (draft.single_jobs if count == 1 else draft.long_jobs).append(job)
        if chunk.samples:
            self._count_gap(job, draft.number)

    def _count_admission(self, job: Job) -> None:
        if job.preempted:
            self._counters.recomputed_tokens += job.length - job.computed
        else:
            self._counters.prompt_tokens += job.length
            self._counters.prefix_hit_tokens += job.computed

    def _count_gap(self, job: Job, number: int) -> None:
        gap, counters = number - job.sampled, self._counters
        if job.sampled and job.preempted:
            counters.largest_preempted_gap = max(counters.largest_preempted_gap, gap)
        elif job.sampled:
            counters.largest_gap = max(counters.largest_gap, gap)
        job.sampled, job.preempted = number, False


def _rank(job: Job) -> tuple[float, int]:
    return job.rank
