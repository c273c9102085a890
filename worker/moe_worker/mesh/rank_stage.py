"""One rank's share of a pass: its stage over the tokens of its shard.

Legend: t tokens of a shard, n those of its tokens whose logits are wanted, D hidden, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_worker.kvcache.paged import PagedCache
from moe_worker.mesh.dispatch import AllToAllDispatch, PlaceTable
from moe_worker.mesh.rebalance.hold import HoldsExperts, ReadsExperts
from moe_worker.models.batch import Batch, Extent
from moe_worker.models.layers import ComputesExperts, StageModel
from moe_worker.models.stage import Stage
from moe_worker.moe.counting import Counter


class Width(NamedTuple):
    """What all ranks know of a pass. most: tokens of the shard that has the most. decode: whether each
    sequence has one token, whose logits are wanted. extents: of all shards.
    """

    most: int
    decode: bool
    extents: Sequence[Extent]


class RankStage(HoldsExperts, Protocol):
    """A rank's stage, prepared to run. hidden: D; logits_dtype: of what the last stage computes."""

    device: torch.device
    dtype: torch.dtype
    hidden: int
    vocabulary: int
    logits_dtype: torch.dtype

    @property
    def stage(self) -> Stage:
        """Which layers."""
        ...

    def compute(
        self, width: Width, batch: Batch, cache: PagedCache, rows: Sequence[int], x_tD: Tensor | None
    ) -> Tensor:
        """Hidden states [t, D], or on the last stage logits [n, V] of the tokens at `rows`.

        All ranks of a stage enter together, those without tokens, too. x_tD: hidden states of the stage
        before; None on the first. The result is valid until the next pass.
        """
        ...

    def expert_counter(self) -> Counter:
        """Counts the experts of this rank's tokens."""
        ...

    def release(self) -> None:
        """Lets go of the connections to other ranks, before they end."""
        ...

    def rejoin(self, group: dist.ProcessGroup) -> None:
        """Goes on over other connections, perhaps between other ranks of the stage. `place` of all layers
        follows, then `resume`.
        """
        ...

    def resume(self) -> None:
        """Prepares passes over the connections, before the first one: together with all ranks of the stage,
        or alone while this one waits to meet them.
        """
        ...

    def exchanged(self) -> tuple[int, float]:
        """Bytes sent to other ranks for experts since the start, and seconds in exchanges, where known."""
        ...


class ModelStage:
    """A model in plain torch or on the CPU kernels."""

    def __init__(self, model: StageModel) -> None:
        self._model = model
        self.device, self.dtype, self.logits_dtype = model.device, model.dtype, torch.float32
        self.hidden, self.vocabulary = model.config.hidden_size, model.config.vocab_size

    @property
    def stage(self) -> Stage:
        """See RankStage."""
        return self._model.stage

    def compute(
        self, width: Width, batch: Batch, cache: PagedCache, rows: Sequence[int], x_tD: Tensor | None
    ) -> Tensor:
        """See RankStage."""
        del width
        x_tD = self._model.forward(batch, cache, x_tD)
        if not self._model.stage.last:
            return x_tD
        return self._model.logits(x_tD[torch.tensor(rows, dtype=torch.int64, device=self.device)])

    def aside(self) -> AbstractContextManager[object]:
        """See HoldsExperts."""
        return contextlib.nullcontext()

    def prepared(
        self, layer: int, before: Sequence[int], held: Sequence[int], read: ReadsExperts,
        rest: Callable[[], object],
    ) -> ComputesExperts:  # fmt: skip
        """See HoldsExperts. Reads all experts anew: the switch then copies nothing."""
        del layer, before
        return self._model.converted(read(held, rest, shared=True), rest)

    def hold(self, layer: int, experts: ComputesExperts, table: PlaceTable) -> ComputesExperts:
        """See HoldsExperts."""
        before = self._model.set_experts(layer, experts)
        self.place(layer, table)
        return before

    def place(self, layer: int, table: PlaceTable) -> None:
        """See HoldsExperts."""
        dispatch = self._model.stage.dispatch(layer)
        if isinstance(dispatch, AllToAllDispatch):
            dispatch.place(table.to(self.device))

    def expert_counter(self) -> Counter:
        """Of the routers."""
        return self._model.expert_counter()

    def release(self) -> None:
        """See RankStage."""

    def rejoin(self, group: dist.ProcessGroup) -> None:
        """See RankStage."""
        for dispatch in self._dispatches():
            dispatch.rejoin(group)

    def resume(self) -> None:
        """See RankStage."""

    def _dispatches(self) -> list[AllToAllDispatch]:
        return [each for each in self._model.stage.dispatches.values() if isinstance(each, AllToAllDispatch)]

    def exchanged(self) -> tuple[int, float]:
        """Of all layers."""
        made = self._dispatches()
        return sum(each.sent_bytes for each in made), sum(each.seconds for each in made)
