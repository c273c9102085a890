"""Counts the tokens of each expert at almost no cost.

A router leaves its last choice in a `Choice`. The counter keeps a reference to each choice and sums many
steps at once, with a handful of small operations and no host synchronisation. On two cores a decode step of
one token over 7 layers pays a few microseconds for it.

Legend: L layers with experts, E experts of a layer, T tokens of a forward pass, K experts of a token, S
passes kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Passes of the same size that are kept until they are added up together, and entries kept at most.
KEPT_PASSES = 32
KEPT_ENTRIES = 1 << 18


@dataclass
class Choice:
    """The last choice of a router: int64 [T, K], -1 for no expert; None before the first forward pass."""

    experts_TK: Tensor | None = None


class Counter(Protocol):
    """Counts the experts that forward passes use."""

    def count(self, tokens: int) -> None:
        """Counts the last forward pass, over `tokens` tokens."""
        ...

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """Passes so far, and for each layer its number, the tokens of each expert, and its activated experts.

        A pass activates an expert if at least one token goes there. Waits for the device.
        """
        ...


class ExpertCounter:
    """Sums the choices of one model's routers.

    layers: numbers of the layers with experts. choices: of their routers, in the same order. experts: of a
    layer. keep: passes that are kept before they are summed; 1 if the next pass writes its choices into the
    same memory.
    """

    def __init__(
        self, layers: Sequence[int], choices: Sequence[Choice], experts: int, keep: int = KEPT_PASSES
    ) -> None:
        self._layers = tuple(layers)
        self._choices = tuple(choices)
        self._experts = experts
        self._keep = keep
        self._kept: list[Tensor] = []
        self._counts_LE: Tensor | None = None
        self._active_L: Tensor | None = None
        self._passes = 0

    def count(self, tokens: int) -> None:
        """Counts the last forward pass; the first `tokens` rows count, others are padding."""
        chosen = [choice.experts_TK for choice in self._choices if choice.experts_TK is not None]
        if not chosen:
            return
        if self._kept and self._kept[0].shape[0] != tokens:
            self._add_up()
        self._kept += chosen if chosen[0].shape[0] == tokens else [x_TK[:tokens] for x_TK in chosen]
        self._passes += 1
        kept = len(self._kept)
        if kept >= self._keep * len(chosen) or kept * chosen[0].numel() >= KEPT_ENTRIES:
            self._add_up()

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """See Counter."""
        if self._kept:
            self._add_up()
        if self._counts_LE is None or self._active_L is None:
            return 0, []
        rows = zip(self._layers, self._counts_LE.tolist(), self._active_L.tolist(), strict=True)
        return self._passes, list(rows)

    @torch.inference_mode()
    def _add_up(self) -> None:
        layers, experts = len(self._choices), self._experts
        chosen_NM = torch.stack(self._kept).flatten(1)  # N = S * L, M = T * K
        self._kept = []
        groups = chosen_NM.shape[0]
        # The first place of each group takes the choices of no expert (-1).
        first_N1 = torch.arange(groups, device=chosen_NM.device).unsqueeze(1) * (experts + 1) + 1
        index = (chosen_NM + first_N1).flatten()
        counts = torch.zeros(groups * (experts + 1), dtype=torch.int64, device=index.device)
        counts.scatter_add_(0, index, torch.ones_like(index))
        counts_SLE = counts.view(-1, layers, experts + 1)[..., 1:]
        sums_LE, active_L = counts_SLE.sum(0), (counts_SLE > 0).sum((0, 2))
        self._counts_LE = sums_LE if self._counts_LE is None else self._counts_LE + sums_LE
        self._active_L = active_L if self._active_L is None else self._active_L + active_L
