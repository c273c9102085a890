"""Input and output of the scheduler. Times are seconds of any monotonic clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_worker.errors import RequestError

# Priorities of a request; higher is sooner.
LEAST_PRIORITY = 0
MOST_PRIORITY = 9

# Shares of tenants, relative to each other.
MOST_WEIGHT = 1000

# Tokens of scored prompts in one step: their logits take 132 MB in float32 with a vocabulary of 129,280.
SCORED_TOKENS = 256

# Placeholder in `Chunk.tokens` for a token that an earlier step samples and the host does not know yet.
UNKNOWN_TOKEN = -1


@dataclass(frozen=True)
class Limits:
    """Limits of concurrency.

    sequences: running at once, at most. waiting: requests beyond them. pages, page_size: the cache; a page
    holds page_size tokens. prefill_tokens: most prompt tokens of one step. least_tokens: prompt
    tokens that a step may always compute, and sequences that may always run, on any machine. target_s: target
    duration of a step, which is the time per output token of a stream. aging_s: waiting time that outweighs
    one level of priority. prefix_cache: whether prompts share pages. micro_batches: steps among which the
    running streams are divided, so that each stage of a pipeline has a step to compute; such a part has
    least_streams at least. ahead: whether a stream may be in a step before the host knows its last token.
    """

    sequences: int
    waiting: int
    pages: int
    page_size: int = 16
    prefill_tokens: int = 2048
    least_tokens: int = 64
    target_s: float = 0.05
    aging_s: float = 10.0
    prefix_cache: bool = True
    micro_batches: int = 1
    least_streams: int = 1
    ahead: bool = True

    @property
    def requests(self) -> int:
        """Requests accepted at a time: running and waiting ones."""
        return self.sequences + self.waiting

    @property
    def step_tokens(self) -> int:
        """No step computes more tokens than this; size buffers by it."""
        return self.sequences + self.prefill_tokens

    @property
    def tokens(self) -> int:
        """Tokens that the whole cache holds."""
        return self.pages * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages for `tokens` tokens of one sequence."""
        return -(-tokens // self.page_size)


class Block(NamedTuple):
    """A part of a prompt, with all before it, that a router knows by name; `end`: tokens up to its end."""

    name: int
    end: int


@dataclass(frozen=True)
class Arrival:
    """A request as the scheduler sees it.

    id: unique among live requests. prompt: token ids, at least one. max_new_tokens: tokens sampled at most,
    at least one. arrived, deadline: times; None: no deadline. priority: LEAST_PRIORITY to MOST_PRIORITY.
    namespace: prompts of two namespaces never share pages. tenant, weight: whose request it is, and its share
    of the machine relative to other tenants. scored: whether the logits of all tokens of the prompt are
    needed, so that it takes no pages from the prefix cache. blocks: of the prompt that have names, in order.
    guided: whether its tokens need masks, which take time.
    """

    id: int
    prompt: Sequence[int]
    max_new_tokens: int
    arrived: float
    priority: int = LEAST_PRIORITY
    deadline: float | None = None
    namespace: str = ""
    tenant: str = ""
    weight: int = 1
    scored: bool = False
    blocks: Sequence[Block] = ()
    guided: bool = False


class Chunk(NamedTuple):
    """The tokens of one sequence that one step computes; a tuple because a step has hundreds of them.

    start: position of the first. tokens: their ids; the last is UNKNOWN_TOKEN if an earlier step that is not
    completed samples it. samples: whether the step samples the token that follows. pages: the page table of
    the sequence from entry `pages_from` on, if it changed (empty: no change). After a sequence is admitted
    (again), pages_from is 0.
    """

    id: int
    start: int
    tokens: list[int]
    samples: bool
    pages_from: int
    pages: Sequence[int]

    @property
    def length(self) -> int:
        """Context length of the sequence after the step."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Step:
    """One forward pass: chunks of one token first, then longer ones, each in scheduling order.

    number: index of the step. planned: time of the plan. tokens: tokens of all chunks.
    """

    number: int
    planned: float
    chunks: list[Chunk]
    tokens: int


class Admitted(NamedTuple):
    """A request that started to run (again).

    cached: tokens that are in the prefix tree or come back from CPU memory.
    """

    id: int
    cached: int


@dataclass(frozen=True)
class Plan:
    """The next step, and the decisions made for it.

    step: what to compute; None if nothing can be computed. expired: requests dropped because their deadline
    has passed; their pages are free. preempted: ids that lost their pages and wait again. admitted: requests
    that start to run with this step.
    """

    step: Step | None
    expired: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    admitted: tuple[Admitted, ...] = ()


@dataclass
class Counters:
    """Sums since the start; a gap is counted in steps from one token of a stream to its next.

    prompt_tokens, prefix_hit_tokens: of requests when they first ran. recomputed_tokens: computed again after
    a preemption. largest_gap: 1 as long as every running stream gets a token in every step, which holds while
    one tenant has all requests, and streams are not divided into micro-batches; largest_preempted_gap is that
    of streams that were preempted between two tokens.
    """

    steps: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    expired: int = 0
    largest_gap: int = 1
    largest_preempted_gap: int = 0


def check(arrival: Arrival, limits: Limits) -> None:
    """Raises RequestError if a request can never run."""
    if not arrival.prompt:
        raise RequestError("prompt", "the prompt is empty; it needs at least one token")
    if arrival.max_new_tokens < 1:
        raise RequestError("max_tokens", f"max_tokens is {arrival.max_new_tokens}; it must be at least 1")
    if not LEAST_PRIORITY <= arrival.priority <= MOST_PRIORITY:
        raise RequestError(
            "priority",
            f"priority {arrival.priority} is out of range; it must be {LEAST_PRIORITY} to {MOST_PRIORITY}",
        )
    if not 1 <= arrival.weight <= MOST_WEIGHT:
        raise RequestError(
            "weight", f"weight {arrival.weight} is out of range; it must be 1 to {MOST_WEIGHT}"
        )
    # The last sampled token is never computed, so it needs no page.
    tokens = len(arrival.prompt) + arrival.max_new_tokens - 1
    if tokens > limits.tokens:
        raise RequestError(
            "prompt",
            f"{len(arrival.prompt)} prompt tokens and {arrival.max_new_tokens} new ones do not fit the KV "
            f"cache, which holds {limits.tokens} tokens; shorten the prompt or lower max_tokens",
        )
