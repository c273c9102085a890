"""First-order importance of the parts of a model.

Source: Molchanov et al., "Importance estimation for neural network pruning", arXiv 1906.10771: the importance
of a part is the squared sum of weight times gradient over its weights, averaged over batches.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Importance:
    """Averages over batches; parts are the elements of named vectors."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def add(self, changes: Mapping[str, Tensor]) -> None:
        """Adds a batch: for each name the sums of weight times gradient of its parts, any shape."""
        for name, change in changes.items():
            squared = change.detach().float().square()
            self._sums[name] = self._sums[name] + squared if name in self._sums else squared
        self._batches += 1

    def __getitem__(self, name: str) -> Tensor:
        """The average of one name's parts."""
        return self._sums[name] / self._batches

    def best(self, name: str, count: int) -> Tensor:
        """The `count` most important parts along the last axis, in ascending order: int64 [..., count].

        Of equal ones the first are kept.
        """
        order = self[name].argsort(dim=-1, descending=True, stable=True)
        return order[..., :count].sort(dim=-1).values


def change(weight: Tensor) -> Tensor:
    """Weight times gradient, element by element; zeros where there is no gradient."""
    if weight.grad is None:
        return torch.zeros_like(weight)
    return weight.detach() * weight.grad
