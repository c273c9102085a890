"""The scheduling policy: which requests run, which wait, and how many tokens each gets in a step.

The order is fixed when a request arrives: its arrival time minus aging_s for each level of priority. So a
higher priority is served first among requests of about the same time, and a lower one once it has waited
aging_s longer for each level between them. Two requests never change places, so no request is preempted
forever. Waiting requests start strictly in this order. When pages run out, after the idle ones of the prefix
tree are evicted, the lowest-priority request is preempted.

All that holds for the requests of one tenant. Several tenants share steps, places in the batch and pages
(`tenants`): streams of one that has more than its share pause, which costs nothing, and of its requests the
lowest-priority one is the first to be preempted.

With several micro-batches, a step has an equal part of the streams, those that have waited longest, and
leaves out streams whose token an earlier step in flight samples: the stages of a pipeline then compute
different steps at the same time.
"""

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_worker.kvcache.heap import LazyHeap
from moe_worker.kvcache.offload import Storage
from moe_worker.scheduler.budget import TokenBudget
from moe_worker.scheduler.job import Job, State, turn
from moe_worker.scheduler.mask_time import LEAST_SLACK_S, SLACK, MaskTime, expected_s
from moe_worker.scheduler.memory import Memory
from moe_worker.scheduler.plan import SCORED_TOKENS, Admitted, Arrival, Chunk, Counters, Limits
from moe_worker.scheduler.tenants import Tenant, Tenants, charge, shares_of, step_tokens

EXPLORED_STEPS = 8
"""While the time of a token is not known, one of so many steps of several tenants has twice as many: steps of
one size, however small, would never tell that others' tokens cost next to nothing."""
OVERTAKEN_STEPS = 1000
"""A request that lacks pages is overtaken by other tenants' requests for so many steps."""


@dataclass
class Draft:
    """The step under construction: chunks of one token and longer ones, each with its job.

    order: running jobs, of which the last one is the first to be preempted. paused: streams that get no
    token. scored: tokens of scored prompts that are left of SCORED_TOKENS. The rest is for several tenants
    or micro-batches. spare: paused streams that may get a token if something is left, in turn. tokens: of
    the whole step, at most. streams: in it, at most. prompts: tokens of prompts that each tenant may compute.
    masks: seconds that each tenant may spend on masks of requests that start. masked: streams that pause
    for their masks, in turn.
    """

    number: int
    order: list[Job]
    paused: set[Job] = field(default_factory=set)
    spare: list[Job] = field(default_factory=list)
    tokens: int = 0
    streams: int = 0
    prompts: dict[Tenant, int] = field(default_factory=dict)
    masks: dict[Tenant, float] = field(default_factory=dict)
    masked: list[Job] = field(default_factory=list)
    scored: int = SCORED_TOKENS
    single: list[Chunk] = field(default_factory=list)
    single_jobs: list[Job] = field(default_factory=list)
    long: list[Chunk] = field(default_factory=list)
    long_jobs: list[Job] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    admitted: list[Admitted] = field(default_factory=list)


class _Short(NamedTuple):
    """The first job in a tenant's queue lacked pages in step `since`; how many it needs."""

    job: Job
    pages: int
    since: int


class SchedulingPolicy:
    """Jobs in scheduling order, and their pages."""

    def __init__(self, limits: Limits, counters: Counters, storage: Storage | None = None) -> None:
        self.budget = TokenBudget(limits)
        self.memory = Memory(limits, storage, self._is_worth)
        self.running: list[Job] = []  # in scheduling order
        self.most_running = limits.sequences
        self._limits = limits
        self._counters = counters
        self._tenants = Tenants()
        self._mask_time = MaskTime(max(LEAST_SLACK_S, SLACK * limits.target_s))
        self._queues: dict[Tenant, LazyHeap[tuple[float, int], Job]] = {}
        self._short: dict[Tenant, _Short] = {}
        self._arrivals = 0
        self._guided = 0  # live requests
        self._assumed_steps = 0

    def add(self, arrival: Arrival) -> Job:
        """Inserts a new request into the queue of its tenant."""
        self._arrivals += 1
        rank = (arrival.arrived - self._limits.aging_s * arrival.priority, self._arrivals)
        tenant = self._tenants.join(arrival.tenant, arrival.weight, arrival.priority)
        job = Job(arrival, rank, tenant)
        self._guided += arrival.guided
        self.memory.announce(job)
        self._queues.setdefault(tenant, LazyHeap(_waits)).push(job.rank, job)
        return job

    def note_mask(self, job: Job, seconds: float) -> None:
        """Counts what the mask of a request took."""
        self._mask_time.note(job, seconds, several=self._tenants.several)

    def end(self, job: Job) -> None:
        """Ends a job in any state; its pages are free."""
        if job.state is State.RUNNING:
            self._stop(job)
        self.memory.free(job)
        self.memory.retract(job)
        job.state = State.ENDED
        self._guided -= job.arrival.guided
        self._tenants.leave(job.tenant)
        if not job.tenant.live:
            del self._queues[job.tenant]
            self._short.pop(job.tenant, None)

    def lower(self, streams: int) -> None:
        """From now on so few streams run that a step has at most `streams` of them, or one."""
        parts = self._limits.micro_batches if streams >= self._limits.least_streams else 1
        self.most_running = max(1, min(self.most_running, streams * parts))

    def lose_cache(self) -> tuple[int, ...]:
        """Preempts every running job, and forgets all prefixes."""
        draft = Draft(0, list(self.running))
        while draft.order:
            self._preempt(draft)
        self.memory.tree.evict(self.memory.tree.idle)
        return tuple(draft.preempted)

    def draft(self, number: int) -> Draft:
        """Step `number`. Every running stream of a lone tenant gets a token; prompts use the rest."""
        several = self._tenants.several
        draft = Draft(number, _interleaved(self.running) if several else list(self.running))
        while len(draft.order) > (2 if several else 1) * self.most_running:
            self._preempt(draft)
        if several:
            self._divide(draft)
        elif self._limits.micro_batches > 1:
            self._take_turns(draft)
        self._prefill(draft, self._decode(draft))
        self._use_rest(draft)
        self._charge(draft)
        return draft

    def _take_turns(self, draft: Draft) -> None:
        """Pauses streams beyond this step's part, and those whose last token is under way.

        Where no stream is left, and the host need not know tokens, the step waits for the one before.
        """
        limits, before = self._limits, draft.number - self._limits.micro_batches
        streams, ready = [], []
        for job in draft.order:
            length = job.length
            if length - job.computed == 1 and length < job.ends:
                streams.append(job)
                if length == len(job.tokens) or (limits.ahead and 0 < job.sampled <= before):
                    ready.append(job)
        if not ready and limits.ahead:
            ready = streams
        most = self._part(len(streams))
        if len(ready) > most:
            ready = sorted(ready, key=turn)
        draft.paused = set(streams).difference(ready[:most])
        draft.spare, draft.streams, draft.tokens = ready[most:], most, self.budget.ceiling

    def _part(self, streams: int) -> int:
        """How many of the running streams may be in a step."""
        limits = self._limits
        if limits.micro_batches == 1:
            return self.most_running
        return max(-(-streams // limits.micro_batches), limits.least_streams)

    def _divide(self, draft: Draft) -> None:
        """Divides the step among several tenants: pauses streams and limits prompts."""
        streams = sum(job.left == 1 for job in draft.order)
        draft.streams = self._part(streams)
        together = streams <= draft.streams and self._limits.ahead
        decoding, prompts = self._demands(draft, 1 if together else self._limits.micro_batches)
        paused: set[Job] = set()
        if self._guided:
            paused, draft.masks = self._mask_time.divide(draft.order, decoding, self._tenants.live.values())
            draft.paused.update(paused)
            draft.masked = sorted(paused, key=turn)
        if paused:
            remaining = {
                tenant: [job for job in jobs if job not in paused] for tenant, jobs in decoding.items()
            }
            decoding = {tenant: jobs for tenant, jobs in remaining.items() if jobs}
        most = self.budget.prompt_tokens(0)
        demands = {
            tenant: len(decoding.get(tenant, ())) + min(prompts.get(tenant, 0), most)
            for tenant in decoding.keys() | prompts.keys()
        }
        if not demands:
            return
        time = self.budget.time(prompts=bool(prompts))
        tokens = step_tokens(demands, time)
        self._assumed_steps = self._assumed_steps + 1 if time.assumed else 0
        if self._assumed_steps and self._assumed_steps % EXPLORED_STEPS == 0:
            tokens *= 2
        tokens = min(tokens, float(self.budget.ceiling))
        chosen: list[Job] = []
        for tenant, share in shares_of(tokens, demands).items():
            jobs = decoding.get(tenant, [])
            # Its own prompts advance, too, however many streams it has.
            for_prompts = min(prompts.get(tenant, 0), max(1, share // 4), share) if jobs else share
            jobs.sort(key=turn)
            chosen += jobs[: share - for_prompts]
            draft.prompts[tenant] = share - min(len(jobs), share - for_prompts)
        places = max(1, min(self.most_running - len(prompts), draft.streams))
        if len(chosen) > places:
            chosen = _interleaved(chosen)[:places]
        taken = set(chosen)
        draft.spare = [job for jobs in decoding.values() for job in jobs if job not in taken]
        draft.paused.update(draft.spare)
        draft.tokens = int(tokens)

    def _demands(self, draft: Draft, apart: int) -> tuple[dict[Tenant, list[Job]], dict[Tenant, int]]:
        """Streams that can get a token, and tokens of prompts, of running requests and the next waiting one.

        apart: steps between two tokens of a stream whose last one is under way. One that paused meanwhile
        waits until the host knows that token.
        """
        decoding: dict[Tenant, list[Job]] = {}
        prompts: dict[Tenant, int] = {}
        for job in draft.order:
            left = job.left
            if left > 1:
                prompts[job.tenant] = prompts.get(job.tenant, 0) + left
            elif left and (job.known or job.sampled + apart == draft.number):
                decoding.setdefault(job.tenant, []).append(job)
            elif left:
                draft.paused.add(job)
        for tenant, queue in self._queues.items():
            first = queue.peek()
            if first is not None and self._may_start(first[1]):
                prompts[tenant] = prompts.get(tenant, 0) + first[1].left
        return decoding, prompts

    def _decode(self, draft: Draft) -> list[Job]:
        """Plans every job with one token to compute; returns those with more.

        A job that is preempted for another one has not been planned yet: it is removed from the end of the
        order, which the loop then does not reach.
        """
        prompts: list[Job] = []
        single, jobs, number, size = draft.single, draft.single_jobs, draft.number, self._limits.page_size
        paused = draft.paused
        for job in draft.order:
            position, length = job.computed, job.length
            if length - position > 1:
                prompts.append(job)
            elif paused and job in paused:
                continue
            elif length < job.ends and (position < len(job.table) * size or self._grow(draft, job)):
                single.append(job.next_token())
                jobs.append(job)
                if job.sampled + 1 == number:
                    job.sampled = number
                else:
                    self._count_gap(job, number)
        return prompts

    def _use_rest(self, draft: Draft) -> None:
        """Gives tokens that a tenant had no pages or places for to streams that pause."""
        left = draft.tokens - len(draft.single) - sum(len(chunk.tokens) for chunk in draft.long)
        places = min(self.most_running - len(draft.long), draft.streams) - len(draft.single)
        spare = draft.spare[: max(0, min(left, places))]
        if not spare and not draft.single and not draft.long:
            spare = draft.masked[:1]  # then nobody waits for its mask
        for job in spare:
            empty = not draft.single and not draft.long
            has_page = job.computed < len(job.table) * self._limits.page_size
            # Only in an empty step nobody is planned who could be preempted.
            waits = job.state is State.RUNNING and job.admitted < draft.number
            if waits and (has_page or (self._grow(draft, job) if empty else self.memory.grow(job))):
                draft.single.append(job.next_token())  # the host may not know it yet
                draft.single_jobs.append(job)
                self._count_gap(job, draft.number)

    def _grow(self, draft: Draft, job: Job) -> bool:
        """One more page for a job; if none is free, jobs at the end of the order are preempted, finally this
        one.
        """
        while not self.memory.grow(job):
            if self._preempt(draft) is job:
                return False
        return True

    def _preempt(self, draft: Draft) -> Job:
        job = draft.order.pop()
        self._stop(job)
        self.memory.free(job)
        job.state, job.preempted = State.WAITING, True
        self._queues[job.tenant].push(job.rank, job)
        draft.preempted.append(job.arrival.id)
        self._counters.preemptions += 1
        return job

    def _is_worth(self, pages: int) -> bool:
        """Whether pages come back sooner than they are computed, as far as steps have been measured.

        A long prompt also saves whole steps: where all steps have one size, they tell no cost of a token.
        """
        time, tokens = self.budget.time(prompts=True), pages * self._limits.page_size
        saved_s = time.per_token * tokens + time.fixed * (tokens // self._limits.prefill_tokens)
        return not time.count or pages * self.memory.page_s < saved_s

    def _stop(self, job: Job) -> None:
        del self.running[bisect_left(self.running, job.rank, key=_rank)]
        job.tenant.running -= 1

    def _prefill(self, draft: Draft, prompts: Sequence[Job]) -> None:
        """Distributes the prompt budget over the tenants' prompts, running and waiting ones.

        First each tenant gets its part, then they get in order what is left.
        """
        waiting = self._limits.micro_batches > 1 and bool(draft.paused)  # for a token of another step
        budget = self.budget.prompt_tokens(max(len(draft.single), waiting))
        if not self._tenants.several:
            for tenant in self._tenants.live.values():
                self._prefill_tenant(draft, tenant, list(prompts), budget)
            return
        order, left = self._tenants.in_order(), max(0, min(budget, draft.tokens - len(draft.single)))
        mine = {tenant: [job for job in prompts if job.tenant is tenant] for tenant in order}
        for parts in (draft.prompts, {}):
            for tenant in order:
                most = min(left, parts.get(tenant, 0) if parts else left)
                left -= self._prefill_tenant(draft, tenant, mine[tenant], most)

    def _prefill_tenant(self, draft: Draft, tenant: Tenant, prompts: list[Job], budget: int) -> int:
        """Distributes tokens over the prompts of a tenant, in scheduling order; returns how many it uses."""
        left, open_ = budget, True
        prompts.sort(key=_rank, reverse=True)
        queue = self._queues[tenant]
        while left and (open_ or prompts) and len(draft.single) + len(draft.long) < self._limits.sequences:
            first = queue.peek() if open_ else None
            if first is not None and (not prompts or first[0] < prompts[-1].rank):
                job = first[1]
                open_ = self._admit(draft, job)
                if not open_:
                    continue
            elif prompts:
                job = prompts.pop()
            else:
                break
            if job.kept:
                left -= self._restore(job, left)
                if job.kept:
                    continue
            count = min(left, job.left)
            if job.arrival.scored:
                count = min(count, draft.scored)
                draft.scored -= count
            if count:
                self._place(draft, job, count)
                left -= count
        return budget - left

    def _restore(self, job: Job, tokens: int) -> int:
        """Pages of a prompt come back from CPU memory, for as long as `tokens` tokens take at most.

        So a long prompt delays streams no longer than one that is computed. At least one page comes back. Its
        tenant pays for that time. Returns the number of tokens that take as long.
        """
        each, per_token = float(self._limits.page_size), self.budget.time(prompts=True).per_token
        if per_token:
            each = min(each, self.memory.page_s / per_token)
        most = len(job.kept) if each * len(job.kept) <= tokens else max(1, int(tokens / each))
        pages = self.memory.restore(job, most)
        job.tenant.pay(pages * self.memory.page_s)
        return min(tokens, math.ceil(each * pages))

    def _admit(self, draft: Draft, job: Job) -> bool:
        """Whether the first job of a tenant's queue can start; none of its jobs overtakes it, so that none
        waits forever.
        """
        running, memory, tenant = len(self.running), self.memory, job.tenant
        if not self._may_start(job) or self._another_waits_long(draft, tenant):
            return False
        empty = not draft.single and not draft.long
        if job.arrival.guided and draft.masks.get(tenant, 0.0) < 0.0 and not empty:
            return False
        # Each running job may soon need a page; without a reserve the new one would soon be preempted.
        needed = memory.missing(job, reserve=running)
        while needed and self._take_page_from_others(draft, tenant, needed):
            needed = memory.missing(job, reserve=len(self.running))
        if needed:
            short = self._short.get(tenant)
            since = short.since if short is not None and short.job is job else draft.number
            self._short[tenant] = _Short(job, needed, since)
            return False
        self._short.pop(tenant, None)
        self._queues[tenant].pop()
        job.state, job.admitted = State.RUNNING, draft.number
        insort(self.running, job, key=_rank)
        tenant.running += 1
        draft.admitted.append(Admitted(job.arrival.id, self._cached(job)))
        self._count_admission(job)
        if job.arrival.guided and tenant in draft.masks:
            draft.masks[tenant] -= expected_s(job)
        return True

    def _may_start(self, job: Job) -> bool:
        """Whether there is a place for the first job of a queue, and may be pages, as far as is known."""
        if not job.known or not self._has_place(job.tenant):
            return False
        short = self._short.get(job.tenant)
        if short is None or short.job is not job:
            return True
        return self.memory.available >= short.pages + len(self.running)

    def _another_waits_long(self, draft: Draft, tenant: Tenant) -> bool:
        """Whether the tenant's requests may no longer overtake one of another tenant that lacks pages."""
        mine = self._short.get(tenant)
        latest = draft.number - OVERTAKEN_STEPS if mine is None else mine.since
        since = [short.since for other, short in self._short.items() if other is not tenant]
        return min(since, default=latest) < min(latest, draft.number - OVERTAKEN_STEPS)

    def _take_page_from_others(self, draft: Draft, tenant: Tenant, needed: int) -> bool:
        """Preempts a paused stream of another tenant for a request that stays within its tenant's share."""
        if not (self._tenants.several and draft.order and draft.order[-1] in draft.paused):
            return False
        pages = needed + sum(len(job.table) for job in self.running if job.tenant is tenant)
        if draft.order[-1].tenant is tenant or pages > self._limits.pages * self._tenants.part(tenant):
            return False
        self._preempt(draft)
        return True

    def _has_place(self, tenant: Tenant) -> bool:
        """Whether one more request of a tenant may run.

        One that has less than its share of a full batch may run nevertheless: then streams of others pause.
        """
        most = min(self.most_running, self.budget.sequences * self._limits.micro_batches)
        running = len(self.running)
        if running < most:
            return True
        room = running < 2 * most and tenant.running < most
        return room and self._tenants.several and self._tenants.below_share(tenant)

    def _charge(self, draft: Draft) -> None:
        """Counts the estimated time of the step for the tenants that it computes tokens of."""
        if self._tenants.several:
            tokens: dict[Tenant, int] = Counter(job.tenant for job in draft.single_jobs)
            for chunk, job in zip(draft.long, draft.long_jobs, strict=True):
                tokens[job.tenant] += len(chunk.tokens)
        else:
            long = sum(len(chunk.tokens) for chunk in draft.long)
            tokens = {tenant: len(draft.single) + long for tenant in self._tenants.live.values()}
        charge(tokens, self.budget.time(prompts=bool(draft.long)))

    def _place(self, draft: Draft, job: Job, count: int) -> None:
        chunk = job.chunk(count)
        (draft.single if count == 1 else draft.long).append(chunk)
        (draft.single_jobs if count == 1 else draft.long_jobs).append(job)
        if chunk.samples:
            self._count_gap(job, draft.number)

    def _count_admission(self, job: Job) -> None:
        if job.preempted:
            self._counters.recomputed_tokens += job.length - self._cached(job)
        else:
            self._counters.prompt_tokens += job.length
            self._counters.prefix_hit_tokens += self._cached(job)

    def _cached(self, job: Job) -> int:
        """Tokens that a job which was just admitted need not compute, unless a page is damaged."""
        return job.computed + len(job.kept) * self._limits.page_size

    def _count_gap(self, job: Job, number: int) -> None:
        gap, counters = number - job.sampled, self._counters
        if job.sampled and job.preempted:
            counters.largest_preempted_gap = max(counters.largest_preempted_gap, gap)
        elif job.sampled:
            counters.largest_gap = max(counters.largest_gap, gap)
        job.sampled, job.preempted = number, False


def _interleaved(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in turns of their tenants by weight, each tenant's in their order: the last has most before it."""
    counts: Counter[Tenant] = Counter()
    keys = []
    for job in jobs:
        counts[job.tenant] += 1
        keys.append((counts[job.tenant] / job.tenant.weight, job.rank, job))
    keys.sort()
    return [job for _, _, job in keys]


def _rank(job: Job) -> tuple[float, int]:
    return job.rank


def _waits(_: tuple[float, int], job: Job) -> bool:
    return job.state is State.WAITING
