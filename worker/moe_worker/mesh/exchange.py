"""Moving tensors between ranks; what torch.distributed raises becomes a sentence."""

import contextlib
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from moe_worker.mesh.errors import RankLostError


def send(x: Tensor, rank: int) -> None:
    """To `rank`, which receives; returns when `x` may change. Raises MeshError."""
    with _reached(f"rank {rank}"):
        dist.send(x.contiguous(), rank)


def receive(into: Tensor, rank: int) -> Tensor:
    """Fills `into` with what `rank` sends. Raises MeshError."""
    with _reached(f"rank {rank}"):
        dist.recv(into, rank)
    return into


def all_to_all(
    into: Tensor,
    x: Tensor,
    group: dist.ProcessGroup | None,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
) -> None:
    """Rows of `x` to all ranks of `group`, `sent` to each (None: equally many); theirs `into`. MeshError."""
    with _reached("a rank of the stage"):
        dist.all_to_all_single(into, x, received, sent, group=group)


def highest(x: Tensor, group: dist.ProcessGroup) -> None:
    """Each element becomes the highest of all ranks of `group`. Raises MeshError."""
    with _reached("a rank of the stage"):
        dist.all_reduce(x, dist.ReduceOp.MAX, group)


@contextlib.contextmanager
def _reached(who: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"{who}: connection lost: {error}; start all ranks again") from error
