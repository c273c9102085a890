"""The device of a thread, and copies from the host to it."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def make_current(device: torch.device) -> None:
    """Makes a CUDA device the current one of this thread: Triton launches there whatever its arguments are,
    and so torch captures graphs and records events. A device without an index is the current one already.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor copied to `device` through pinned memory, so that the host does not wait for the GPU. On a
    CPU the tensor itself.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Staging:
    """Copies one array to `into`, a tensor on the device, again and again; allocates memory only once.

    There are two buffers in turn, so the host fills one while the device may still read the other. Before a
    buffer is filled again, the host waits until its last copy has ended, which it has if the step in between
    has been launched.
    """

    def __init__(self, into: Tensor) -> None:
        pinned = into.is_cuda
        self._into = into
        self._buffers = [torch.zeros(into.shape, dtype=into.dtype, pin_memory=pinned) for _ in range(2)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._copied = [torch.cuda.Event() if pinned else None for _ in self._buffers]
        self._turn = 0

    def buffer(self) -> NDArray[Any]:
        """What the next call of `copy` copies; holds what an earlier copy held."""
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._arrays[self._turn]

    def copy(self) -> None:
        """Starts to copy the buffer."""
        self._into.copy_(self._buffers[self._turn], non_blocking=True)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.record()
        self._turn = 1 - self._turn
