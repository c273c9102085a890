"""One step of the engine: plan, compute, choose, and turn tokens into text."""

from dataclasses import dataclass, field

import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Delta, FinishReason, Load, Request
from moe_worker.models.batch import Batch, Chunk
from moe_worker.sampling.sampler import Draw, choose
from moe_worker.sampling.text import TextStream
from moe_worker.scheduler.batching import Limits, Phase, Placed, Scheduler


@dataclass
class _Sequence:
    """A request under way. `cached` tokens of it are in the cache; `last` is the newest, not yet cached."""

    request: Request
    limit: int
    text: TextStream
    cached: int = 0
    generated: int = 0
    last: int = field(default=-1)

    @property
    def draw(self) -> Draw:
        return Draw(self.request.sampling, self.request.seed, self.generated)


class EngineCore:
    """Runs requests over one loaded model. Not for several threads at once."""

    def __init__(self, loaded: LoadedModel, options: EngineOptions) -> None:
        self._loaded = loaded
        self._ends = frozenset(loaded.config.eos_token_ids)
        self._pages_each = loaded.cache.shape.pages_for(loaded.context)
        slots = loaded.cache.pages // self._pages_each
        self._scheduler = Scheduler(Limits(slots, options.max_queue, options.prefill_tokens))
        self._sequences: dict[int, _Sequence] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._sequences

    @property
    def most_requests(self) -> int:
        """Requests that `submit` takes at once."""
        return self._scheduler.limits.requests

    @property
    def load(self) -> Load:
        """How busy the engine is now."""
        cache = self._loaded.cache
        return Load(
            queued=self._scheduler.waiting,
            running=self._scheduler.running,
            kv_tokens_capacity=cache.pages * cache.page_size,
            kv_tokens_used=sum(sequence.cached for sequence in self._sequences.values()),
        )

    def submit(self, request: Request) -> None:
        """Takes a checked request. Raises QueueFullError."""
        self._scheduler.submit(request.id, len(request.prompt))
        room = self._loaded.context - len(request.prompt)
        limit = min(request.sampling.max_tokens, room)
        self._sequences[request.id] = _Sequence(request, limit, TextStream(request.sampling.stop))

    def cancel(self, request: int) -> None:
        """Drops a request and frees its slot; one that has finished already is no error."""
        self._sequences.pop(request, None)
        self._scheduler.release(request)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Computes one step: a token for each sequence in it. Empty where there is nothing to do."""
        step = self._scheduler.plan()
        if step is None:
            return []
        sequences = [self._sequences[placed.request] for placed in step.sequences]
        chunks = [
            self._chunk(step.phase, placed, sequence)
            for placed, sequence in zip(step.sequences, sequences, strict=True)
        ]
        order = sorted(range(len(chunks)), key=lambda index: chunks[index].count > 1)
        chunks, sequences = [chunks[i] for i in order], [sequences[i] for i in order]
        batch = Batch.of(chunks, self._loaded.cache)
        hidden_TD = self._loaded.model.forward(batch, self._loaded.cache)
        if step.phase is Phase.PREFILL:
            hidden_TD = hidden_TD[batch.last_rows]
        logits_BV = self._loaded.model.logits(hidden_TD)
        chosen = choose(logits_BV, [sequence.draw for sequence in sequences])
        return [
            self._advance(sequence, chunk.end, token)
            for sequence, chunk, token in zip(sequences, chunks, chosen, strict=True)
        ]

    def _chunk(self, phase: Phase, placed: Placed, sequence: _Sequence) -> Chunk:
        first = placed.slot * self._pages_each
        pages = range(first, first + self._pages_each)
        if phase is Phase.DECODE:
            return Chunk([sequence.last], sequence.cached, pages)
        return Chunk(sequence.request.prompt, 0, pages)

    def _advance(self, sequence: _Sequence, cached: int, token: int) -> Delta:
        sequence.cached = cached
        sequence.generated += 1
        sequence.last = token
        ended = token in self._ends
        text = "" if ended else sequence.text.push(self._loaded.tokenizer.token_bytes(token))
        if sequence.text.stopped or ended:
            reason = FinishReason.STOP
        elif sequence.generated >= sequence.limit:
            reason = FinishReason.LENGTH
        else:
            return Delta(sequence.request.id, token, text)
        self.cancel(sequence.request.id)
        return Delta(sequence.request.id, token, text + sequence.text.finish(), reason)
