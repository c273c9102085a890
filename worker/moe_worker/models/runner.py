"""What the engine asks of a loaded model, and the ways to run one.

Legend: T tokens of a pass, N tokens whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch
from moe_worker.models.deepseek import DeepseekModel
from moe_worker.models.native import NativeCounter, NativeModel, NativePass


class Counter(Protocol):
    """Counts which experts passes use."""

    def count(self, tokens: int) -> None:
        """Takes in the pass that ran last, over `tokens` tokens."""
        ...

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """Passes so far, and for each layer its number, the tokens of each expert, and its active experts."""
        ...


class Runner(Protocol):
    """Computes passes."""

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """Runs a pass, writing the cache; [N, V] for the tokens at `rows`, which rise.

        float32, or what the device computed them in. They are good until the next pass.
        """
        ...

    def expert_counter(self) -> Counter:
        """Counts the experts that the passes from now on use."""
        ...


@dataclass(frozen=True)
class TorchRunner:
    """The model as it is written in torch."""

    model: DeepseekModel

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """[N, V]."""
        hidden_TD = self.model.forward(batch, cache)
        if len(rows) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD[torch.tensor(rows, dtype=torch.long, device=hidden_TD.device)]
        return self.model.logits(hidden_TD)

    def expert_counter(self) -> Counter:
        """Of the model's routers."""
        return self.model.expert_counter()


@dataclass(frozen=True)
class NativeRunner:
    """W4A8 by the CPU kernels, one call a pass."""

    model: NativeModel

    def logits(self, batch: Batch, cache: PagedCache, rows: Sequence[int]) -> Tensor:
        """[N, V]."""
        starts = [0, *accumulate(segment.count for segment in batch.segments)]
        step = NativePass(
            tokens_T=batch.tokens_T,
            positions_T=batch.positions_T,
            rows_T=batch.rows_T,
            starts=torch.tensor(starts, dtype=torch.int32),
            lengths_B=batch.lengths_B,
            pages_BP=batch.pages_BP,
            selected_N=torch.tensor(rows, dtype=torch.int32),
        )
        return self.model.run(step, cache.layers, cache.page_size)

    def expert_counter(self) -> Counter:
        """Of the kernels."""
        return NativeCounter(self.model)
