"""A live request inside the scheduler."""

from collections import deque
from enum import Enum

from moe_worker.kvcache.offload import Kept
from moe_worker.kvcache.prefix import Node
from moe_worker.scheduler.plan import UNKNOWN_TOKEN, Arrival, Chunk
from moe_worker.scheduler.tenants import Tenant


class State(Enum):
    """The state of a request. A preempted one waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Job:
    """The progress of a request, and its pages.

    tokens: known ones, of the prompt and sampled. length: tokens, with those sampled by steps under way.
    computed: tokens in the cache once all planned steps are done; written: once all completed ones are.
    table: its pages; the first `shared` are the path to `node` in the prefix tree. kept: pages in CPU memory
    that come back next, before it computes anything. told: entries of the table that earlier planned chunks
    contain. announced: names of its blocks, held until it ends. mask_s: seconds of its masks, on average;
    None: not known yet. admitted, sampled: numbers of the steps in which it last started to run and got its
    newest token (0: never, or that step was reverted).
    """

    __slots__ = (
        "admitted",
        "announced",
        "arrival",
        "computed",
        "ends",
        "kept",
        "length",
        "mask_s",
        "node",
        "preempted",
        "rank",
        "sampled",
        "shared",
        "state",
        "table",
        "tenant",
        "tokens",
        "told",
        "written",
    )

    def __init__(self, arrival: Arrival, rank: tuple[float, int], tenant: Tenant) -> None:
        self.arrival = arrival
        self.tenant = tenant
        self.rank = rank
        self.state = State.WAITING
        self.tokens = list(arrival.prompt)
        self.length = len(self.tokens)
        self.ends = self.length + arrival.max_new_tokens
        self.computed = self.written = 0
        self.table: list[int] = []
        self.node: Node | None = None
        self.shared = 0
        self.kept: deque[Kept] = deque()
        self.told = 0
        self.announced: tuple[int, ...] = ()
        self.mask_s: float | None = None
        self.admitted = 0
        self.sampled = 0
        self.preempted = False

    @property
    def known(self) -> bool:
        """Whether the host knows all its tokens."""
        return self.length == len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens to compute before its next one can be sampled; 0 if it gets no more."""
        return self.length - self.computed if self.length < self.ends else 0

    def next_token(self) -> Chunk:
        """Plans the next token of a stream, for which it has a page, and samples the one after it.

        Does what `chunk(1)` does, faster: it runs for every stream in every step.
        """
        start, told, tokens, table = self.computed, self.told, self.tokens, self.table
        token = tokens[start] if start < len(tokens) else UNKNOWN_TOKEN
        self.computed = start + 1
        self.length += 1
        if told == len(table):
            return Chunk(self.arrival.id, start, [token], True, told, ())
        self.told = len(table)
        return Chunk(self.arrival.id, start, [token], True, told, table[told:])

    def chunk(self, count: int) -> Chunk:
        """Plans its next `count` tokens, for which it has pages."""
        start, end, told = self.computed, self.computed + count, self.told
        tokens = self.tokens[start:end]
        samples = end == self.length
        self.computed = end
        self.length += samples
        self.told = len(self.table)
        return Chunk(self.arrival.id, start, tokens, samples, told, self.table[told:])

    def undo(self, chunk: Chunk, step: int) -> None:
        """Reverts the newest chunk, planned in step number `step`."""
        if chunk.samples:
            self.length -= 1
            self.sampled = 0  # the time to its next token says nothing about who was planned when
        if self.state is State.RUNNING and self.admitted <= step:
            self.computed = chunk.start
            self.told = min(self.told, chunk.pages_from)


def turn(job: Job) -> tuple[int, tuple[float, int]]:
    """Sorts requests so that who has waited longest for a token comes first."""
    return job.sampled, job.rank
