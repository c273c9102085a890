"""Samples the next token of each sequence on the device, without waiting for it.

Legend: B sequences, V vocabulary, L sequences that want log-probabilities, N the most any of them wants.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_worker.kernels.draw import draw_rows
from moe_worker.kernels.likeliest import Likeliest, likeliest
from moe_worker.sampling.adjust import TokenCounts
from moe_worker.sampling.batch import Row, SamplingBatch, build
from moe_worker.sampling.guides import Allowed
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.remote import FAILED, Draw


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities on the device: rows (of the batch) and counts (how many each wants) on the host.

    chosen_L: float32. top_LN: float32, falling. tokens_LN: int64.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    chosen_L: Tensor
    top_LN: Tensor
    tokens_LN: Tensor

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Logprobs":
        """The same with all tensors moved by `move`."""
        return replace(
            self,
            chosen_L=move(self.chosen_L),
            top_LN=move(self.top_LN),
            tokens_LN=move(self.tokens_LN),
        )

    def listed(self) -> dict[int, TokenLogprobs]:
        """By row, on the host; waits for the device."""
        columns = zip(
            self.rows,
            self.counts,
            self.chosen_L.tolist(),
            self.tokens_LN.tolist(),
            self.top_LN.tolist(),
            strict=True,
        )
        return {
            row: TokenLogprobs(chosen, tuple(zip(tokens[:count], top[:count], strict=True)))
            for row, count, chosen, tokens, top in columns
        }


@dataclass(frozen=True)
class Sampled:
    """The tokens of one step, on the device.

    tokens_B: int64, below the vocabulary size. failed_B: bool, rows that cannot be sampled because a logit is
    NaN or +inf, or all are -inf; their token is undefined, and other rows are not affected. logprobs: None if
    no row requested them.
    """

    tokens_B: Tensor
    failed_B: Tensor
    logprobs: Logprobs | None = None


# Batches whose tensors are kept: a pipeline's steps have different sequences in turn.
KEPT_BATCHES = 8


class Sampler:
    """Samples tokens for admitted sequences.

    A sequence is admitted once, before its first token is due, and released when it ends; preemption needs no
    call. A step that was launched before it ended may still sample it; that token means nothing. Tokens of a
    sequence do not depend on the rest of the batch. `ends`: the model's end-of-text tokens.
    """

    def __init__(self, vocab_size: int, device: torch.device, ends: Collection[int]) -> None:
        self._device = device
        self._ends = frozenset(ends)
        self._rows: dict[int, Row] = {}
        self._counts = TokenCounts(vocab_size, device)
        self._batches: list[SamplingBatch] = []  # of different sequences each, the newest first

    def admit(
        self,
        name: int,
        parameters: SamplingParameters,
        seed: int,
        prompt: Sequence[int],
        output: Sequence[int] = (),
    ) -> None:
        """Adds a sequence with validated parameters; `output` has the tokens generated so far.

        It replaces a sequence of the same name.
        """
        self.release(name)
        row = Row(parameters, seed, len(output), parameters.end_tokens(self._ends))
        if parameters.penalizes:
            row.counted = self._counts.open(prompt, output)
        self._rows[name] = row

    def release(self, name: int) -> None:
        """Removes a sequence; ignores unknown names."""
        row = self._rows.pop(name, None)
        if row is not None and row.counted is not None:
            self._counts.close(row.counted)
        self._batches = [batch for batch in self._batches if name not in batch.names]

    def next_draw(self, name: int) -> Draw | None:
        """How the next token of a sequence is drawn; None where only this sampler can."""
        row = self._rows.get(name)
        return None if row is None else Draw.of(row)

    def note_drawn(self, names: Iterable[int]) -> None:
        """Another process has drawn a token of each of these sequences."""
        for row in (self._rows[name] for name in names if name in self._rows):
            row.generated += 1

    def sample(
        self,
        logits_BV: Tensor,
        names: Sequence[int],
        allowed: Allowed | None = None,
        known: Likeliest | None = None,
    ) -> Sampled:
        """One token for each of the sequences `names`, in their order; the host never waits for the device.

        logits_BV: of any floating dtype; is left as it is. allowed: tokens that formats allow; None: all.
        known: the likeliest tokens of `logits_BV`; None: they are not known. Counts the tokens as generated.
        """
        batch = self._batch_of(tuple(names))
        sampled = sample(logits_BV, batch, allowed, known)
        batch.advance(sampled.tokens_B)
        return sampled

    def _batch_of(self, names: tuple[int, ...]) -> SamplingBatch:
        found = next((batch for batch in self._batches if batch.names == names), None)
        if found is None:
            rows = [self._rows.get(name) or _released() for name in names]
            found = build(names, rows, self._counts, self._device)
            others = [batch for batch in self._batches if not set(names).intersection(batch.names)]
            self._batches = [found, *others[: KEPT_BATCHES - 1]]
        return found


def _released() -> Row:
    """Stands for a sequence that has ended."""
    return Row(SamplingParameters(), seed=0, generated=0, ends=frozenset())


def sample(
    logits_BV: Tensor, batch: SamplingBatch, allowed: Allowed | None = None, known: Likeliest | None = None
) -> Sampled:
    """One token for each row. Temperature 0 takes the first of the most likely tokens.

    known: the likeliest of `logits_BV`, if they are known; the result keeps none of its tokens' memory.
    """
    # On a GPU, the kernels take any dtype.
    scores_BV = logits_BV if logits_BV.is_cuda else logits_BV.float()
    if batch.adjusts:
        scores_BV, known = logits_BV.to(torch.float32, copy=True), None
        batch.adjust(scores_BV)
    if allowed is not None:
        scores_BV, known = allowed.masked(scores_BV), None
    best = likeliest(scores_BV) if known is None else known
    tokens_B = best.tokens_B if known is None else best.tokens_B.clone()
    for part in batch.sampling:
        draw_rows(scores_BV, best, part, batch.step, tokens_B)
    return Sampled(tokens_B, best.failed_B, _logprobs(logits_BV, tokens_B, batch))


def with_drawn(sampled: Sampled | None, drawn_D: Tensor, rows: Sequence[int]) -> Sampled:
    """`sampled`, and the tokens that another process has drawn, as rows `rows` of all (rising)."""
    count = len(rows) + (0 if sampled is None else sampled.tokens_B.shape[0])
    others = sorted({*range(count)} - {*rows})
    tokens_B = drawn_D.new_empty(count)
    tokens_B[rows] = drawn_D
    if sampled is None:
        return Sampled(tokens_B.clamp(min=0), tokens_B == FAILED)
    tokens_B[others] = sampled.tokens_B
    failed_B = tokens_B == FAILED
    failed_B[others] = sampled.failed_B
    logprobs = sampled.logprobs
    if logprobs is not None:
        logprobs = replace(logprobs, rows=tuple(others[row] for row in logprobs.rows))
    return Sampled(tokens_B.clamp(min=0), failed_B, logprobs)


def _logprobs(logits_BV: Tensor, tokens_B: Tensor, batch: SamplingBatch) -> Logprobs | None:
    """Of the model's own distribution, as vLLM's `raw_logprobs`: sampling parameters do not change them."""
    if not batch.wanted:
        return None
    logprobs_LV = logits_BV.index_select(0, batch.wanted_L).float().log_softmax(dim=-1)
    chosen_L = logprobs_LV.gather(1, tokens_B[batch.wanted_L].unsqueeze(1)).squeeze(1)
    top_LN, tokens_LN = logprobs_LV.topk(min(batch.most_logprobs, logprobs_LV.shape[1]), dim=-1)
    counts = tuple(batch.rows[row].parameters.logprobs or 0 for row in batch.wanted)
    return Logprobs(batch.wanted, counts, chosen_L, top_LN, tokens_LN)
