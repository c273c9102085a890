"""Results of the engine for one request that the client has not read yet."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from moe_api.clock import Anchor
from moe_worker.engine.requests import Delta, FinishReason
from moe_worker.engine.statistics import Event, EventKind
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.service.pacing import Pacing

PROMPT_MOST: Final = 1024
"""Tokens of a prompt in one message: about 400 KiB with 20 likely ones for each."""
_ENDED_BY_STATUS: Final = frozenset({FinishReason.FORMAT, FinishReason.FAILED})
"""No message can have these reasons, and the client still waits for what came before."""


@dataclass(frozen=True)
class TextChunk:
    """The next message to the client. `finish_reason` is set on the last one.

    prompt: log-probabilities of the next tokens of the prompt, from the second one on.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: tuple[TokenLogprobs, ...] = ()


@dataclass
class Timeline:
    """Times of one request, in nanoseconds of `time.monotonic_ns`; 0 for an event that has not happened.

    anchor: turns them into timestamps. events: those about tokens, such as hits of the cache.
    """

    anchor: Anchor
    submitted_ns: int
    prefill_start_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    largest_gap_ns: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    events: list[tuple[int, Event]] = field(default_factory=list)

    def add(self, delta: Delta, end_ns: int) -> None:
        """Adds a token from a step that ended at `end_ns`."""
        if self.tokens == 0 and delta.token is not None:
            self.first_token_ns = end_ns
        elif delta.token is not None:
            self.largest_gap_ns = max(self.largest_gap_ns, end_ns - self.last_token_ns)
        self.tokens += delta.token is not None
        self.last_token_ns = end_ns
        self.finish_reason = delta.finish_reason

    def note(self, event: Event, at_ns: int) -> None:
        """Adds an event other than a token; `cached_tokens` are those found when it first ran."""
        if event.kind is EventKind.ADMITTED and not self.prefill_start_ns:
            self.prefill_start_ns, self.cached_tokens = at_ns, event.tokens
        if event.tokens:
            self.events.append((at_ns, event))


@dataclass
class Stream:
    """Collects deltas until the client reads them and `pacing` allows a message.

    So slow readers, and all readers of a busy worker, get fewer, larger messages. The first token and the end
    do not wait.

    It holds at most the remaining tokens of the request, so the context length bounds it, and the scores of
    its prompt, which `SamplingParameters.prompt_violations` bounds.
    """

    timeline: Timeline
    pacing: Pacing = field(default_factory=Pacing)
    _waits: bool = False  # for its turn
    _text: list[str] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _prompt: deque[TokenLogprobs] = field(default_factory=deque)
    _error: Exception | None = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pending(self) -> bool:
        """Whether there is something to take."""
        return bool(self._tokens or self._prompt)

    @property
    def failed(self) -> bool:
        """Whether the stream ended in an error: nothing more will come."""
        return self._error is not None

    def push(self, delta: Delta, end_ns: int) -> None:
        """Adds what a step that ended at `end_ns` has produced."""
        self.timeline.add(delta, end_ns)
        self._text.append(delta.text)
        if delta.token is not None:
            self._tokens.append(delta.token)
        if delta.logprobs is not None:
            self._logprobs.append(delta.logprobs)
        self._prompt.extend(delta.prompt)
        if self._ready.is_set():
            return
        if self.timeline.tokens <= 1 or delta.finish_reason is not None:
            self.send()
        elif not self._waits:
            self._waits = True
            self.pacing.add(self)

    def send(self) -> None:
        """Lets `take` return what has come."""
        self._waits = False
        if self.pending or self.timeline.finish_reason is not None:
            self._ready.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream: after the client has read everything before, `take` raises `error`."""
        self._error = error
        self._ready.set()

    async def take(self) -> TextChunk:
        """Everything since the last call; waits for a token or the end. Raises the error given to `fail`.

        What came before a failure is a chunk of its own.
        """
        await self._ready.wait()
        if self._error is not None and not self.pending:
            raise self._error
        if len(self._prompt) > PROMPT_MOST:
            return TextChunk("", (), None, prompt=self._scores())
        reason = self.timeline.finish_reason
        if reason in _ENDED_BY_STATUS and self.pending:
            reason = None
        elif self._error is None:
            self._ready.clear()
        scores = self._scores()
        chunk = TextChunk("".join(self._text), tuple(self._tokens), reason, tuple(self._logprobs), scores)
        for gathered in (self._text, self._tokens, self._logprobs):
            gathered.clear()
        return chunk

    def _scores(self) -> tuple[TokenLogprobs, ...]:
        return tuple(self._prompt.popleft() for _ in range(min(len(self._prompt), PROMPT_MOST)))
