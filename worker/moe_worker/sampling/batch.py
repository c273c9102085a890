"""Sampling parameters of a batch as tensors on the device; rebuilt only when the rows change.

Legend: B rows, S rows that sample, V vocabulary, K steps, N lanes of noise, L rows that want
log-probabilities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from moe_worker.kernels.draw import MIN_TEMPERATURE, SHORT_TOP_K, UNIT, Sampling, Truncation
from moe_worker.kernels.randomness import mix, signed
from moe_worker.sampling.adjust import Biases, Penalties, TokenCounts, to_device
from moe_worker.sampling.parameters import SamplingParameters

# Rows are sampled in parts of at most this many logits: larger ones take gigabytes with large vocabularies.
PART_LOGITS = 2**24
# The kernels of a GPU need at most one more float32 for each logit.
GPU_PART_LOGITS = 2**27
ALWAYS = 2**62


@dataclass
class Row:
    """One sequence: its parameters and generated tokens. `counted`: its row of the token counts."""

    parameters: SamplingParameters
    seed: int
    generated: int
    ends: frozenset[int]
    counted: int | None = None


@dataclass
class SamplingBatch:
    """Rows that are sampled together; `step` counts the steps so far.

    first_B: int64, the index of the first token of each row that this batch samples.
    """

    names: tuple[int, ...]
    rows: tuple[Row, ...]
    first_B: Tensor
    biases: Biases | None
    waits: Biases | None
    penalties: Penalties | None
    sampling: tuple[Sampling, ...]
    wanted: tuple[int, ...]
    wanted_L: Tensor
    most_logprobs: int
    step: int = 0

    @property
    def adjusts(self) -> bool:
        """Whether logits change before sampling."""
        return not (self.biases is None and self.waits is None and self.penalties is None)

    def adjust(self, scores_BV: Tensor) -> None:
        """Applies logit biases, min_tokens and penalties, in this order."""
        for biases in (self.biases, self.waits):
            if biases is not None:
                biases.apply(scores_BV, self.first_B + self.step)
        if self.penalties is not None:
            self.penalties.apply(scores_BV)

    def advance(self, tokens_B: Tensor) -> None:
        """Records the sampled tokens, which stay on the device."""
        if self.penalties is not None:
            self.penalties.count(tokens_B)
        self.step += 1
        for row in self.rows:
            row.generated += 1


def build(
    names: Sequence[int], rows: Sequence[Row], counts: TokenCounts, device: torch.device
) -> SamplingBatch:
    """The batch of `rows`, which belong to the sequences `names`; `counts` has the tokens to penalize."""
    wanted = [(number, row.parameters.logprobs) for number, row in enumerate(rows)]
    asked = [(number, most) for number, most in wanted if most is not None]
    penalized = [
        (number, row.counted, row.parameters) for number, row in enumerate(rows) if row.counted is not None
    ]
    return SamplingBatch(
        names=tuple(names),
        rows=tuple(rows),
        first_B=to_device((row.generated for row in rows), torch.int64, device),
        biases=Biases.of(_biases(rows), device),
        waits=Biases.of(_waits(rows), device),
        penalties=Penalties.of(counts, penalized, device),
        sampling=_sampling(rows, counts.output_PV.shape[1], device),
        wanted=tuple(number for number, _ in asked),
        wanted_L=to_device((number for number, _ in asked), torch.int64, device),
        most_logprobs=max((most for _, most in asked), default=0),
    )


def _biases(rows: Sequence[Row]) -> list[tuple[int, int, float, int]]:
    return [
        (number, token, bias, ALWAYS)
        for number, row in enumerate(rows)
        for token, bias in row.parameters.logit_bias
    ]


def _waits(rows: Sequence[Row]) -> list[tuple[int, int, float, int]]:
    return [
        (number, token, -math.inf, row.parameters.min_tokens)
        for number, row in enumerate(rows)
        if row.generated < row.parameters.min_tokens
        for token in row.ends
    ]


def _sampling(rows: Sequence[Row], vocab_size: int, device: torch.device) -> tuple[Sampling, ...]:
    numbers = [number for number, row in enumerate(rows) if row.parameters.temperature > 0]
    groups: tuple[list[int], list[int]] = [], []  # rows without top-k and top-p do not pay for others
    for number in numbers:
        groups[rows[number].parameters.truncates].append(number)
    size = max(1, (GPU_PART_LOGITS if device.type == "cuda" else PART_LOGITS) // vocab_size)
    parts = (group[start : start + size] for group in groups for start in range(0, len(group), size))
    return tuple(_part(part, [rows[number] for number in part], vocab_size, device) for part in parts)


def _part(numbers: list[int], rows: list[Row], vocab_size: int, device: torch.device) -> Sampling:
    heats = (max(row.parameters.temperature, MIN_TEMPERATURE) for row in rows)
    return Sampling(
        to_device(numbers, torch.int64, device),
        to_device(heats, torch.float32, device).unsqueeze(1),
        to_device((signed(mix(row.seed)) for row in rows), torch.int64, device).unsqueeze(1),
        to_device((row.generated for row in rows), torch.int64, device).unsqueeze(1),
        truncation([row.parameters for row in rows], vocab_size, device),
    )


def truncation(parameters: Sequence[SamplingParameters], vocab_size: int, device: torch.device) -> Truncation:
    """Top-k, top-p and min-p of these rows."""
    # A top-k of the whole vocabulary keeps all tokens, as 0 does.
    top_k = [given.top_k if given.top_k < vocab_size else 0 for given in parameters]
    top_p = [given.top_p for given in parameters]
    min_p = torch.tensor([given.min_p for given in parameters], dtype=torch.float32)
    min_mass = min_p.mul_(UNIT).floor_().tolist()
    shorts = (0 < k <= SHORT_TOP_K for k, p in zip(top_k, top_p, strict=True) if p < 1)
    limits = chain.from_iterable(zip(top_k, top_p, min_mass, strict=True))
    truncates = any(top_k) or min(top_p) < 1

    def column(values: Sequence[float], dtype: torch.dtype, *, needed: bool) -> Tensor | None:
        return to_device(values, dtype, device).unsqueeze(1) if needed else None

    return Truncation(
        top_k_S1=column(top_k, torch.int64, needed=any(top_k)),
        largest_top_k=max(top_k, default=0),
        top_p_S1=column(top_p, torch.float64, needed=min(top_p) < 1),
        short=all(shorts) and max(top_k, default=0) <= SHORT_TOP_K,
        min_mass_S1=column(min_mass, torch.float32, needed=any(min_mass)),
        limits_S3=to_device(limits, torch.float64, device).view(-1, 3) if truncates else None,
    )
