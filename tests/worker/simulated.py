"""A pretended device that runs the scheduler's steps and proves that attention would read the right rows.

The model is a pure function of the tokens so far: a row of the cache holds a digest of the text up to its
token, and the next token follows from the digest. So a row that is missing, stale, of another text or at
another position changes what is read, and is noticed at once.
"""

from itertools import islice

from moe_worker.scheduler.core import Scheduler
from moe_worker.scheduler.plan import UNKNOWN_TOKEN, Arrival

VOCABULARY = 3


def digests(namespace, tokens, before=()):
    """A digest for each token, of the namespace and all tokens up to it."""
    found = list(before)
    for token in tokens[len(found) :]:
        found.append(hash((found[-1] if found else hash(namespace), token)))
    return found


def sample(digest):
    return (digest >> 7) % VOCABULARY


def continuation(arrival):
    """What the model says to a prompt, computed alone."""
    tokens = list(arrival.prompt)
    seen = digests(arrival.namespace, tokens)
    for _ in range(arrival.max_new_tokens):
        tokens.append(sample(seen[-1]))
        seen = digests(arrival.namespace, tokens, seen)
    return tokens[len(arrival.prompt) :]


class SimulatedStorage:
    """CPU memory for evicted pages; `lose` damages what a slot holds.

    late: calls of `run` until a page that is fetched has arrived. frames: pages that are under way at a time.
    """

    page_s = 0.0

    def __init__(self, slots, page_size):
        self.slots, self._size = slots, page_size
        self.late, self.frames = 0, 4
        self._held, self._damaged, self._fetched, self._promised = {}, set(), {}, set()

    def fetch(self, slots):
        for slot in islice(slots, self.frames):
            if len(self._fetched) < self.frames:
                self._fetched.setdefault(slot, self.late)

    def forget(self, slot):
        if slot not in self._promised:
            self._fetched.pop(slot, None)

    def run(self, moves, rows):
        back = {slot for slot, _, saves in moves if not saves}
        assert not self.late or all(self._fetched.pop(slot) == 0 for slot in back)
        self._promised.clear()
        self._fetched = {slot: max(0, left - 1) for slot, left in self._fetched.items()}
        for slot, page, saves in moves:
            places = range(page * self._size, (page + 1) * self._size)
            if saves:
                self._held[slot] = [rows.get(place) for place in places]
                self._damaged.discard(slot)
            else:
                rows.update(zip(places, self._held[slot], strict=True))

    def lose(self, slot):
        self._damaged.add(slot)
        self._held[slot] = [0] * self._size

    def ready(self, slot):
        return slot in self._held

    def intact(self, slot):
        if self.late and self._fetched.get(slot) != 0:
            return None
        if slot in self._damaged:
            self._fetched.pop(slot, None)
            return False
        self._promised.add(slot)
        return True


class SimulatedEngine:
    """Runs steps when they are planned, as a GPU's stream does; the host learns the tokens at `complete`."""

    def __init__(self, limits, slots=0):
        self.storage = SimulatedStorage(slots, limits.page_size) if slots else None
        self.scheduler = Scheduler(limits, self.storage)
        self.limits = limits
        self.now = 0.0
        self.arrivals, self.outputs, self.ended = {}, {}, {}
        self._texts, self._digests, self._tables = {}, {}, {}
        self._rows = {}
        self._flights = []

    @property
    def flights(self):
        return len(self._flights)

    def submit(self, number, prompt, new_tokens, **more):
        arrival = Arrival(number, prompt, new_tokens, arrived=self.now, **more)
        self.scheduler.submit(arrival)
        self.arrivals[number], self.outputs[number] = arrival, []
        self._texts[number] = list(prompt)
        self._digests[number] = digests(arrival.namespace, list(prompt))

    def plan(self):
        """Plans a step and runs it; returns the plan."""
        plan = self._planned()
        if plan.step is not None:
            self._flights.append((plan.step, self._run(plan.step)))
        return plan

    def plan_and_fail(self):
        """Plans a step that the device refuses."""
        plan = self._planned()
        if plan.step is not None:
            self.scheduler.retract(plan.step, shrink=False)
        return plan

    def _planned(self):
        plan = self.scheduler.plan(self.now)
        for number in plan.expired:
            self._end(number, "expired")
        if self.storage is not None:
            self.storage.run(self.scheduler.take_moves(), self._rows)
        return plan

    def complete(self):
        """The host learns what the oldest step sampled; returns who is done."""
        step, sampled = self._flights.pop(0)
        for number, token in sampled:
            if number not in self.ended:
                self.outputs[number].append(token)
        done = self.scheduler.complete(step, [token for _, token in sampled], self.now)
        for number in done:
            self._end(number, "finished")
        return done

    def step(self, seconds=0.01):
        """Plans, runs and completes one step."""
        plan = self.plan()
        self.now += seconds
        if plan.step is not None:
            self.complete()
        return plan

    def cancel(self, number):
        self.scheduler.release(number)
        self._end(number, "cancelled")

    def _end(self, number, how):
        assert number not in self.ended
        self.ended[number] = how
        arrival, output = self.arrivals[number], self.outputs[number]
        if how == "finished":
            assert output == continuation(arrival)
        else:
            assert output == continuation(arrival)[: len(output)]

    def drain(self, steps=10_000):
        """Runs until nothing is left."""
        for _ in range(steps):
            while self._flights:
                self.complete()
            if self.scheduler.idle:
                return
            self.now += 0.01
            self.plan()
        raise AssertionError("some request never ends")

    def _run(self, step):
        assert 0 < step.tokens <= self.limits.step_tokens
        assert len(step.chunks) <= self.limits.sequences
        lengths = [len(chunk.tokens) for chunk in step.chunks]
        assert sum(lengths) == step.tokens
        assert len({chunk.id for chunk in step.chunks}) == len(step.chunks)
        assert [length > 1 for length in lengths] == sorted(length > 1 for length in lengths)
        for chunk in step.chunks:
            self._tables[chunk.id] = self._tables.get(chunk.id, [])[: chunk.pages_from] + list(chunk.pages)
        self._check_exclusive(step)
        # All rows of a step are written before any is read, as in a layer of the model.
        for chunk in step.chunks:
            self._write(chunk)
        return [(chunk.id, token) for chunk in step.chunks if (token := self._attend(chunk)) is not None]

    def _check_exclusive(self, step):
        """A page that a sequence writes to belongs to no other sequence of the step."""
        readers = {}
        for chunk in step.chunks:
            for page in self._tables[chunk.id][: self.limits.pages_for(chunk.length)]:
                readers.setdefault(page, set()).add(chunk.id)
        size = self.limits.page_size
        for chunk in step.chunks:
            for page in self._tables[chunk.id][chunk.start // size : self.limits.pages_for(chunk.length)]:
                assert readers[page] == {chunk.id}

    def _write(self, chunk):
        text, end = self._texts[chunk.id], chunk.length
        truth = text[chunk.start : end]
        assert len(truth) == len(chunk.tokens) > 0
        assert chunk.tokens == truth or chunk.tokens == [*truth[:-1], UNKNOWN_TOKEN]
        for position in range(chunk.start, end):
            self._rows[self._row(chunk.id, position)] = self._digests[chunk.id][position]

    def _attend(self, chunk):
        """Reads every row of the sequence, as attention does; the next token where there is one."""
        seen = [self._rows.get(self._row(chunk.id, position)) for position in range(chunk.length)]
        known = self._digests[chunk.id]
        assert seen == known[: chunk.length]
        assert chunk.samples == (chunk.length == len(known))
        if not chunk.samples:
            return None
        token = sample(known[-1])
        self._texts[chunk.id].append(token)
        self._digests[chunk.id] = digests(self.arrivals[chunk.id].namespace, self._texts[chunk.id], known)
        return token

    def _row(self, number, position):
        size = self.limits.page_size
        return self._tables[number][position // size] * size + position % size

    def check_pages(self):
        """Every reference to a page has a holder, and every page is free, idle or in use."""
        memory = self.scheduler._policy.memory
        holders = dict.fromkeys(range(self.limits.pages), 0)
        for job in self.scheduler._policy.running:
            assert len(job.table) == len(set(job.table))
            for page in job.table:
                holders[page] += 1
        used = sum(count > 0 for count in holders.values())
        nodes = [child for root in memory.tree._roots.values() for child in root.children.values()]
        count = 0
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            holders[node.page] += 1
            count += 1
        assert count == memory.tree.pages
        assert all(memory.pool.references(page) == held for page, held in holders.items())
        scheduler = self.scheduler
        assert scheduler.used_pages == used
        assert scheduler.free_pages + scheduler.cached_pages + scheduler.used_pages == self.limits.pages
