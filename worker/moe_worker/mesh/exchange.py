"""Moving tensors between ranks; what torch.distributed raises becomes a sentence."""

import contextlib
import re
from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_worker.mesh.errors import RankLostError
from moe_worker.models.memory import lack_of_memory

_SOURCE = re.compile(r"^\[\S+\.cc:\d+\] ")


def send(x: Tensor, rank: int) -> None:
    """To `rank`, which receives; returns when `x` may change. Raises MeshError."""
    with _reached(f"rank {rank}"):
        dist.send(x.contiguous(), rank)


def receive(into: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Fills `into` with what `rank` sends. Raises MeshError."""
    with _reached(f"rank {rank}"):
        dist.recv(into, rank, group=group)
    return into


class Early:
    """Receives during the computation: on a GPU what arrives need not wait for kernels launched before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def receive(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Tensor:
        """What `rank` sends; kernels launched from now on wait for it. Raises MeshError."""
        apart = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with apart, _reached(f"rank {rank}"):
            into = torch.empty(shape, dtype=dtype, device=self._device)
            work = dist.irecv(into, rank)
        with _reached(f"rank {rank}"):
            if work is not None:
                work.wait()
        if self._stream is not None:
            into.record_stream(torch.cuda.current_stream(self._device))
        return into


class Outbox:
    """Sends without a wait for the receiver, which may compute something else; of at most `most` tensors.

    sent_bytes: since the start.
    """

    def __init__(self, most: int) -> None:
        self._most, self.sent_bytes = most, 0
        self._sent: deque[tuple[dist.Work, Tensor, int]] = deque()

    def send(self, x: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> None:
        """A copy of `x` to `rank`, which receives. Raises MeshError."""
        copy = x.clone(memory_format=torch.contiguous_format)
        self.sent_bytes += copy.nbytes
        with _reached(f"rank {rank}"):
            work = dist.isend(copy, rank, group=group)
        if work is not None:
            self._sent.append((work, copy, rank))
        while self._sent and (len(self._sent) > self._most or self._sent[0][0].is_completed()):
            gone, _, to = self._sent.popleft()
            with _reached(f"rank {to}"):
                gone.wait()

    def forget(self) -> None:
        """Drops the sends in flight without waiting for them."""
        self._sent.clear()


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
        with lack_of_memory():
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLostError(f"{who}: connection lost: {_short(error)}; see its log") from error


def _short(error: Exception) -> str:
    """Without the place in gloo's source and its advice for developers."""
    return _SOURCE.sub("", " ".join(str(error).split()).partition(". This is typically")[0])
