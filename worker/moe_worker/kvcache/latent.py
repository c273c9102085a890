"""The latent KV cache: one row of kv_lora_rank + qk_rope_head_dim values for each token and layer.

Legend: L layers, W latent width, C positions of one slot. A slot holds one sequence; row slot * C + position
of the flat array is its token at that position, so that the model sees only row numbers and a paged
layout can take this one's place.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_worker.config.model import ModelConfig
from moe_worker.errors import SettingsError


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that the cache needs for one token over all layers."""
    return config.num_hidden_layers * config.latent_width * dtype.itemsize


def slots_that_fit(
    config: ModelConfig, dtype: torch.dtype, context: int, memory: int | None, most: int
) -> int:
    """Sequences of `context` tokens that fit into `memory` bytes (None: no limit), `most` at most.

    Raises SettingsError where not even one fits.
    """
    if memory is None:
        return most
    one = context * bytes_per_token(config, dtype)
    if memory < one:
        raise SettingsError(
            f"KV memory of {memory} bytes is too small: one context of {context} tokens takes {one} bytes; "
            f"give at least that, or a context length of at most {memory // bytes_per_token(config, dtype)}"
        )
    return min(most, memory // one)


@dataclass(frozen=True)
class LatentCache:
    """Storage for `slots` sequences of `context` tokens each.

    `layers` holds one array [slots * C, W] a layer.
    """

    slots: int
    context: int
    layers: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls, config: ModelConfig, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> "LatentCache":
        """Zeroed storage; on Linux CPUs pages take memory only once they are written.

        Raises SettingsError where the device has not enough memory.
        """
        shape = (config.num_hidden_layers, slots * context, config.latent_width)
        try:
            layers = _zeros(shape, dtype, device)
        except (RuntimeError, MemoryError) as error:
            size = slots * context * bytes_per_token(config, dtype)
            raise SettingsError(
                f"the KV cache of {slots} contexts of {context} tokens takes {size} bytes, more than "
                f"{device} has free; lower the KV memory, the batch size or the context length"
            ) from error
        return cls(slots, context, layers.unbind(0))

    def slot_rows(self, layer: int, slot: int, length: int) -> Tensor:
        """The first `length` rows [length, W] of one slot, as a view."""
        start = slot * self.context
        return self.layers[layer][start : start + length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros writes every page; numpy's zeros on a CPU come from the kernel when they are touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(shape)
