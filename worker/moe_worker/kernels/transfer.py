"""From the host to the device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on `device`; through pinned memory, so that the host does not wait for what a GPU still
    computes. On a CPU the tensor itself.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
