"""What the engine asks of a loaded model.

Legend: N tokens whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from moe_worker.kernels.likeliest import Likeliest
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.layers import StageModel
from moe_worker.moe.counting import Counter


class Runner(Protocol):
    """Computes forward passes."""

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """Computes a forward pass and writes the cache; logits [N, V] of the tokens at `rows`, in rising
        order.

        The dtype is float32 or that of the device. The logits are valid until the next pass.
        """
        ...

    def expert_counter(self) -> Counter:
        """Counts the experts that forward passes use from now on."""
        ...


@runtime_checkable
class TellsChoices(Protocol):
    """A Runner that can tell which experts the tokens of its newest pass had."""

    def keep_choices(self) -> None:
        """Lets `choices` tell them from now on."""
        ...

    def choices(self) -> list[Tensor]:
        """The routed experts of each token, [T, K], of each layer with experts in order; -1: none."""
        ...


@runtime_checkable
class FindsLikeliest(Protocol):
    """A Runner whose passes may end with the likeliest tokens, which saves launches."""

    def likeliest(self) -> Likeliest | None:
        """Of the logits of the newest pass, and valid as long; None where that pass did not look for them."""
        ...


@dataclass(frozen=True)
class ModelRunner:
    """A model in one process, in plain torch or on the CPU kernels."""

    model: StageModel

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """[N, V] float32."""
        return self.model.next_logits(batch, cache, rows)

    def expert_counter(self) -> Counter:
        """The counter of the model."""
        return self.model.expert_counter()

    def keep_choices(self) -> None:
        """See StageModel."""
        self.model.keep_choices()

    def choices(self) -> list[Tensor]:
        """See StageModel."""
        return self.model.choices()
