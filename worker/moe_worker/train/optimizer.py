"""Muon for the matrices, AdamW for the rest, and the learning rate over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer


def _orthogonalize(update: torch.Tensor, steps: int) -> torch.Tensor:
    """Moves the singular values of each matrix towards 1 by a quintic Newton-Schulz iteration.

    Sums are part of the products, so that there is nothing for a compiler to fuse.

    Args:
        update: [matrices, rows, columns], any float type.
        steps: iterations; 5 bring singular values into about [0.7, 1.2].

    Returns:
        bfloat16 of the same shape.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the
    coefficients are the published ones.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: torch.Tensor = update.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized per matrix (Jordan et al., 2024).

    Takes parameters of two or more dimensions; leading ones (experts, say) are separate matrices.
    Matrices of one shape are updated together: this model has some sixty, and one batched product is
    ten times faster than sixty small ones. The step is scaled to the size an AdamW step would have,
    0.2 * sqrt(larger side), so that both share one learning rate (Liu et al., arXiv 2502.16982).
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            parameters, {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Updates every parameter that has a gradient; takes no closure."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[-2:]].append(parameter)
            for parameters in by_shape.values():
                self._step_shape(parameters, group)

    def _step_shape(self, parameters: list[torch.Tensor], group: dict[str, float]) -> None:
        updates = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
        rows, columns = parameters[0].shape[-2:]
        stacked = torch.cat([update.reshape(-1, rows, columns) for update in updates])
        sizes = [update.numel() // (rows * columns) for update in updates]
        pieces = torch.split(_orthogonalize(stacked, 5), sizes)
        scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            parameters,
            [
                piece.reshape(parameter.shape).to(parameter.dtype)
                for piece, parameter in zip(pieces, parameters, strict=True)
            ],
            alpha=-scale,
        )

    def _momentum(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """Nesterov momentum of the gradient."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average: torch.Tensor = state["momentum"]
        gradient = parameter.grad
        if gradient is None:
            raise RuntimeError("a parameter without a gradient reached the update")
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def learning_rate_factor(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Warm-up, stable, decay (WSD; Hu et al., arXiv 2404.06395): the share of the peak rate at a step.

    Rises linearly over `warmup` steps, stays at 1, and falls linearly to 0 over the last
    `decay_share` of all steps.
    """
    decay = max(1, round(steps * decay_share))
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / decay)


def make_optimizers(
    parameters: Iterable[tuple[str, nn.Parameter]],
    ranges: list[nn.Parameter],
    kind: str,
    learning_rate: float,
    weight_decay: float,
) -> list[Optimizer]:
    """Optimizers for a model's named parameters; each group's "peak" is its rate before the schedule.

    `kind` "muon": Muon for the matrices inside the layers, AdamW without decay for embeddings, output head,
    routers and norms. "adamw": AdamW for all, with decay of the matrices. `ranges` are those of rounded
    weights, which move at a tenth of the rate.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters:
        inside = name.startswith("layers.") and parameter.dim() > 1 and "router" not in name
        (matrices if inside else others).append(parameter)
    fused = others[0].is_cuda
    adamw: list[dict[str, object]] = [{"params": others, "weight_decay": 0.0}]
    if ranges:
        adamw.append({"params": ranges, "weight_decay": 0.0, "lr": learning_rate / 10})
    optimizers: list[Optimizer] = []
    if kind == "muon":
        optimizers.append(Muon(matrices, learning_rate, weight_decay=weight_decay))
    else:
        adamw.append({"params": matrices, "weight_decay": weight_decay})
    optimizers.append(torch.optim.AdamW(adamw, lr=learning_rate, betas=(0.9, 0.95), fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
