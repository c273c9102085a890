"""Counters of the engine. No torch: the RPC edge reads them, too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from moe_worker.scheduler.plan import Chunk, Counters, Plan, Step


class Statistics(NamedTuple):
    """Sums since the start. A tuple, because every step sends it to the edge as a list.

    sequences: summed over steps. prefill_tokens: of prompts, including recomputation after a preemption
    (recomputed_tokens has that part alone). decode_tokens: computed in decode, one for each step and stream.
    output_tokens: sampled. prompt_tokens, prefix_hit_tokens: of requests when they first ran. evictions:
    pages evicted from idle prefixes. offloaded, restored: pages kept in CPU memory when they were evicted,
    and pages that came back.
    """

    steps: int = 0
    sequences: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    expired: int = 0
    evictions: int = 0
    offloaded: int = 0
    restored: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.prefill_tokens + self.decode_tokens


class EventKind(Enum):
    """Events of a request other than tokens."""

    ADMITTED = "admitted"
    PREEMPTED = "preempted"


class Event(NamedTuple):
    """An event of request `id`.

    tokens: for ADMITTED those found in the cache; for PREEMPTED those of its prompt and text so far, which
    are recomputed.
    """

    id: int
    kind: EventKind
    tokens: int


class LayerExperts(NamedTuple):
    """One layer since the start: tokens of each expert, and activated experts summed over steps.

    rank_tokens: of each rank of the layer's stage; empty where experts are not spread.
    """

    layer: int
    tokens: tuple[int, ...]
    active: int
    rank_tokens: tuple[float, ...] = ()


class DomainExperts(NamedTuple):
    """A domain, the tokens learned from, and the share of each expert in its choices, layer by layer."""

    name: str
    tokens: int
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ExpertStatistics:
    """All layers with experts, in order, over `steps` steps.

    domains: of the capability matrix, where it is learned. fit: share of the choices that went to the experts
    that it had named before; None before anything was compared. tokens: computed in these steps.
    experts_per_token: routed experts of a token, at most.
    """

    steps: int = 0
    layers: tuple[LayerExperts, ...] = ()
    domains: tuple[DomainExperts, ...] = ()
    fit: float | None = None
    tokens: int = 0
    experts_per_token: int = 0

    def since(self, before: "ExpertStatistics") -> "ExpertStatistics":
        """The difference to `before`, which is of the same engine, or empty."""
        if not before.layers:
            return self
        pairs = zip(self.layers, before.layers, strict=True)
        layers = tuple(_difference(new, old) for new, old in pairs)
        steps, tokens = self.steps - before.steps, self.tokens - before.tokens
        return replace(self, steps=steps, layers=layers, tokens=tokens)


@dataclass
class Tally:
    """Counters in addition to the scheduler's; steps are counted after they have run."""

    events: list[Event] = field(default_factory=list)
    _sequences: int = 0
    _prefill: int = 0
    _decode: int = 0
    _output: int = 0
    _steps: int = 0

    def note(self, plan: Plan, lengths: Mapping[int, int]) -> None:
        """Records a plan's events; `lengths` has the tokens of each request."""
        self.events += (Event(id_, EventKind.PREEMPTED, lengths[id_]) for id_ in plan.preempted)
        self.events += (Event(id_, EventKind.ADMITTED, cached) for id_, cached in plan.admitted)

    def count(self, step: Step, decoded: int, sampled: int) -> None:
        """Records a step that has run: its tokens of decode, and those that it sampled."""
        self._steps += 1
        self._sequences += len(step.chunks)
        self._decode += decoded
        self._prefill += step.tokens - decoded
        self._output += sampled

    def take_events(self) -> tuple[Event, ...]:
        """Events since the last call."""
        events, self.events = tuple(self.events), []
        return events

    def statistics(
        self, counters: Counters, evictions: int, offloaded: tuple[int, int] = (0, 0)
    ) -> Statistics:
        """All sums, including the scheduler's."""
        return Statistics(
            steps=self._steps,
            sequences=self._sequences,
            prefill_tokens=self._prefill,
            decode_tokens=self._decode,
            output_tokens=self._output,
            prompt_tokens=counters.prompt_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            recomputed_tokens=counters.recomputed_tokens,
            preemptions=counters.preemptions,
            expired=counters.expired,
            evictions=evictions,
            offloaded=offloaded[0],
            restored=offloaded[1],
        )


def decode_tokens(chunks: Sequence[Chunk], given: Sequence[int]) -> int:
    """Tokens of decode among those of `chunks`; given: tokens of each one's prompt and resumed stream."""
    pairs = zip(chunks, given, strict=True)
    return [len(chunk.tokens) == 1 and chunk.start >= prompt for chunk, prompt in pairs].count(True)


def _difference(new: LayerExperts, old: LayerExperts) -> LayerExperts:
    tokens = tuple(a - b for a, b in zip(new.tokens, old.tokens, strict=True))
    return LayerExperts(new.layer, tokens, new.active - old.active)
