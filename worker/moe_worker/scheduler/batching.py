"""Continuous batching: whole prompts are computed when a slot is free, then sequences decode together."""

import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from moe_worker.errors import QueueFullError

# Time in which a place in a full queue is likely to come free; a guess until step times are measured.
RETRY_AFTER_S = 1.0


class Phase(Enum):
    """What a step computes."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Limits:
    """slots: sequences in the batch; waiting: requests beyond them; prefill_tokens: prompt tokens of a step
    (a longer prompt takes a step of its own).
    """

    slots: int
    waiting: int
    prefill_tokens: int

    @property
    def requests(self) -> int:
        """Requests taken at once: those in the batch and those that wait."""
        return self.slots + self.waiting


@dataclass(frozen=True)
class Placed:
    """A request and the slot that holds its sequence."""

    request: int
    slot: int


@dataclass(frozen=True)
class Step:
    """What to compute next, in order of slots."""

    phase: Phase
    sequences: tuple[Placed, ...]


@dataclass
class Scheduler:
    """Decides which sequences each step computes, and which slot each occupies.

    Prompts come first: a waiting request starts as soon as a slot is free, in order of arrival. The lowest
    free slot is taken, so that the slots in use stay close together.
    """

    limits: Limits
    _waiting: deque[tuple[int, int]] = field(default_factory=deque)
    _running: dict[int, int] = field(default_factory=dict)
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._free = list(range(self.limits.slots))

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    def submit(self, request: int, prompt_tokens: int) -> None:
        """Takes a request into the queue. Raises QueueFullError."""
        if self.waiting + self.running >= self.limits.requests:
            raise QueueFullError(
                f"the queue is full ({self.limits.waiting} requests wait); try again", RETRY_AFTER_S
            )
        self._waiting.append((request, prompt_tokens))

    def release(self, request: int) -> None:
        """Forgets a request that has finished or was cancelled; its slot is free at once. Idempotent."""
        slot = self._running.pop(request, None)
        if slot is not None:
            heapq.heappush(self._free, slot)
        else:
            self._waiting = deque(entry for entry in self._waiting if entry[0] != request)

    def plan(self) -> Step | None:
        """The next step; None where there is nothing to do."""
        admitted = self._admit()
        if admitted:
            return Step(Phase.PREFILL, admitted)
        if self._running:
            return Step(Phase.DECODE, _by_slot(self._running))
        return None

    def _admit(self) -> tuple[Placed, ...]:
        admitted: dict[int, int] = {}
        tokens = 0
        while self._waiting and self._free:
            request, prompt_tokens = self._waiting[0]
            tokens += prompt_tokens
            if admitted and tokens > self.limits.prefill_tokens:
                break
            self._waiting.popleft()
            admitted[request] = heapq.heappop(self._free)
        self._running.update(admitted)
        return _by_slot(admitted)


def _by_slot(slots: dict[int, int]) -> tuple[Placed, ...]:
    return tuple(
        sorted((Placed(request, slot) for request, slot in slots.items()), key=lambda placed: placed.slot)
    )
