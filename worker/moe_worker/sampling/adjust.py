"""Changes logits before sampling: bias, min_tokens and penalties.

Legend: B rows of the batch, V vocabulary, P rows with penalties, N single logits.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.kernels import transfer
from moe_worker.sampling.parameters import SamplingParameters


def to_device(values: Iterable[float | int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of `values` on the device; the host does not wait for the device."""
    return transfer.to_device(torch.tensor(list(values), dtype=dtype), device)


class TokenCounts:
    """Tokens of the sequences with penalties: 5 bytes per token of the vocabulary and sequence."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.output_PV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.prompt_PV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._free: list[int] = []

    def open(self, prompt: Iterable[int], output: Iterable[int]) -> int:
        """A row with the counts of these tokens."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        prompt_T = to_device(prompt, torch.int64, self.output_PV.device)
        output_T = to_device(output, torch.int64, self.output_PV.device)
        self.prompt_PV[row].zero_().index_fill_(0, prompt_T, value=True)
        self.output_PV[row].zero_().index_add_(0, output_T, torch.ones_like(output_T, dtype=torch.int32))
        return row

    def close(self, row: int) -> None:
        """Returns a row."""
        self._free.append(row)

    def _grow(self) -> None:
        size = self.output_PV.shape[0]
        more = max(size, 4)
        self.output_PV = torch.cat((self.output_PV, self.output_PV.new_zeros(more, self.output_PV.shape[1])))
        self.prompt_PV = torch.cat((self.prompt_PV, self.prompt_PV.new_zeros(more, self.prompt_PV.shape[1])))
        self._free.extend(range(size, size + more))


@dataclass(frozen=True)
class Penalties:
    """Penalties of the rows that have any.

    rows_P: in the batch; counts_P: in `counts`. repetition_P1, presence_P1, frequency_P1: float32.
    """

    counts: TokenCounts
    rows_P: Tensor
    counts_P: Tensor
    repetition_P1: Tensor
    presence_P1: Tensor
    frequency_P1: Tensor

    @classmethod
    def of(
        cls, counts: TokenCounts, given: list[tuple[int, int, SamplingParameters]], device: torch.device
    ) -> "Penalties | None":
        """From (row of the batch, row of `counts`, parameters); None if there are none."""
        if not given:
            return None

        def column(values: Iterable[float]) -> Tensor:
            return to_device(values, torch.float32, device).unsqueeze(1)

        return cls(
            counts,
            to_device((row for row, _, _ in given), torch.int64, device),
            to_device((counted for _, counted, _ in given), torch.int64, device),
            column(parameters.repetition_penalty for _, _, parameters in given),
            column(parameters.presence_penalty for _, _, parameters in given),
            column(parameters.frequency_penalty for _, _, parameters in given),
        )

    def apply(self, scores_BV: Tensor) -> None:
        """Changes `scores_BV`: repetition first, then frequency and presence, as vLLM does."""
        scores_PV = scores_BV[self.rows_P]
        output_PV = self.counts.output_PV[self.counts_P]
        written_PV = output_PV > 0
        seen_PV = written_PV | self.counts.prompt_PV[self.counts_P]
        repeated_PV = torch.where(
            scores_PV > 0, scores_PV / self.repetition_P1, scores_PV * self.repetition_P1
        )
        scores_PV = torch.where(seen_PV, repeated_PV, scores_PV)
        scores_PV -= self.frequency_P1 * output_PV
        scores_PV -= self.presence_P1 * written_PV
        scores_BV[self.rows_P] = scores_PV

    def count(self, tokens_B: Tensor) -> None:
        """Counts the sampled tokens."""
        self.counts.output_PV.index_put_(
            (self.counts_P, tokens_B[self.rows_P]),
            torch.ones_like(self.counts_P, dtype=torch.int32),
            accumulate=True,
        )


@dataclass(frozen=True)
class Biases:
    """Values that are added to single logits: rows_N, tokens_N (int64), values_N (float32).

    until_N: index of the token of the row at which the bias ends.
    """

    rows_N: Tensor
    tokens_N: Tensor
    values_N: Tensor
    until_N: Tensor

    @classmethod
    def of(cls, given: list[tuple[int, int, float, int]], device: torch.device) -> "Biases | None":
        """From (row, token, value, until); None if there are none."""
        if not given:
            return None
        rows, tokens, values, until = zip(*given, strict=True)
        return cls(
            to_device(rows, torch.int64, device),
            to_device(tokens, torch.int64, device),
            to_device(values, torch.float32, device),
            to_device(until, torch.int64, device),
        )

    def apply(self, scores_BV: Tensor, indices_B: Tensor) -> None:
        """Changes `scores_BV`; `indices_B` are the numbers of the tokens to choose."""
        values_N = self.values_N.masked_fill(indices_B[self.rows_N] >= self.until_N, 0.0)
        scores_BV.index_put_((self.rows_N, self.tokens_N), scores_BV[self.rows_N, self.tokens_N] + values_N)
