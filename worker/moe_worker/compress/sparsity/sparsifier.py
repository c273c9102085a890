"""Masks of named weights during training."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from moe_worker.compress.sparsity.patterns import QUAD, mask_keeping
from moe_worker.compress.sparsity.schedule import Schedule, SparsityPhase
from moe_worker.errors import SettingsError

Saliency = Literal["magnitude", "gradient"]
# The share of a gradient saliency that stays from step to step: it averages over some ten batches.
MEMORY = 0.9


class Sparsifier(nn.Module):
    """A mask for each weight, tightened by a schedule; its state is part of the state of a run.

    `saliency` is the importance of a weight: "magnitude", |w|, or "gradient", the average of |w dL/dw|, the
    first-order change of the loss without it (Molchanov et al., arXiv 1906.10771).
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        schedule: Schedule,
        saliency: Saliency = "magnitude",
        update_every: int = 10,
    ) -> None:
        """`weights` are those to mask, [..., I] each; masks are on the same device.

        Raises SettingsError for a weight whose inputs are no multiple of four.
        """
        super().__init__()
        for name, weight in weights.items():
            if weight.shape[-1] % QUAD:
                raise SettingsError(
                    f"{name} has {weight.shape[-1]} inputs; sparsity of {schedule.kept} in 4 needs a "
                    "multiple of 4: change that size of the model, or leave this weight dense"
                )
        self.schedule, self.saliency, self.update_every = schedule, saliency, update_every
        self._names = {name: name.replace(".", "-") for name in weights}
        for name, weight in weights.items():
            ones = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
            self.register_buffer(f"mask-{self._names[name]}", ones)
            if saliency == "gradient":
                self.register_buffer(f"worth-{self._names[name]}", torch.zeros_like(weight))

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of each weight, bool, by the weight's name."""
        return {name: self._buffer("mask", name) for name in self._names}

    def needs_gradients(self, step: int) -> bool:
        """Whether `observe` must see the gradients of this step."""
        return self.saliency == "gradient" and self.schedule.phase(step) is not SparsityPhase.FIXED

    @torch.no_grad()
    def update(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Chooses new masks if the schedule requires it, before `step` is computed."""
        if not self._is_due(step):
            return
        kept = self.schedule.kept_at(step)
        for name in self._names:
            self._buffer("mask", name).copy_(mask_keeping(self._worth(name, weights[name]), kept))

    @torch.no_grad()
    def observe(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Adds the gradients of the step with respect to the unmasked weights to their saliency."""
        for name in self._names:
            worth = (weights[name] * gradients[name]).abs()
            self._buffer("worth", name).mul_(MEMORY).add_(worth, alpha=1 - MEMORY)

    def apply_masks(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masked weights of `step`.

        While masks tighten, a masked weight gets the gradient that it would have without the mask
        (straight-through), so it may return; once masks are fixed, it gets none. Source: Zhou et al., arXiv
        2102.04010.
        """
        phase = self.schedule.phase(step)
        if phase is SparsityPhase.DENSE:
            return dict(weights)
        if phase is SparsityPhase.FIXED:
            return {name: weights[name] * mask for name, mask in self.masks.items()}
        return {name: weights[name] - (weights[name] * ~mask).detach() for name, mask in self.masks.items()}

    def _is_due(self, step: int) -> bool:
        first, fixed = self.schedule.first_sparse, self.schedule.first_fixed
        return step == fixed or (first <= step < fixed and (step - first) % self.update_every == 0)

    def _worth(self, name: str, weight: Tensor) -> Tensor:
        """The saliency; magnitude as long as gradient saliency has no observations."""
        if self.saliency == "gradient" and bool(self._buffer("worth", name).any()):
            return self._buffer("worth", name)
        return weight.abs()

    def _buffer(self, kind: str, name: str) -> Tensor:
        return self.get_buffer(f"{kind}-{self._names[name]}")
