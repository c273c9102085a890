"""Rotary position embedding (arXiv:2104.09864) over interleaved pairs, plain or extended by YaRN.

Legend: T tokens, P rotary elements of a head, C positions.
"""

import math

import torch
from torch import Tensor

from moe_worker.config.attention import RopeConfig, YarnConfig


def rotation_table(config: RopeConfig, positions: int, device: torch.device) -> Tensor:
    """Unit rotations (times YaRN's magnitude), complex64 of shape [C, P / 2], for positions 0 to C - 1."""
    frequencies, magnitude = _frequencies(config)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.polar(torch.full_like(angles, magnitude), angles).to(device)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turns each pair (x[2i], x[2i + 1]) of the last axis by rotations[..., i]; same shape and dtype."""
    # The copy makes storage offset and strides even, whatever slice x is: complex views need that.
    real = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(real.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs.mul_(rotations)).flatten(-2).to(x.dtype)


def attention_scale(config: RopeConfig, head: int) -> float:
    """The scale of attention scores for heads of `head` elements: 1 / sqrt(head), times the square of
    DeepSeek's YaRN magnitude.
    """
    scale = 1 / math.sqrt(head)
    if config.yarn is None or config.yarn.mscale_all_dim is None:
        return scale
    return scale * _magnitude(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    exponents = torch.arange(0, config.width, 2, dtype=torch.float32) / config.width
    base = 1.0 / config.theta**exponents
    if config.yarn is None:
        return base, 1.0
    keep = _kept_share(config.yarn, config.theta, config.width)
    return base * keep + base / config.yarn.factor * (1 - keep), _table_magnitude(config.yarn)


def _table_magnitude(yarn: YarnConfig) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale is not None and yarn.mscale_all_dim is not None:
        return _magnitude(yarn.factor, yarn.mscale) / _magnitude(yarn.factor, yarn.mscale_all_dim)
    return _magnitude(yarn.factor, 1.0)


def _kept_share(yarn: YarnConfig, theta: float, width: int) -> Tensor:
    """Share of the original frequency of each pair: 1 for pairs that turn often in the original context."""

    def pair_with(rotations: float) -> float:
        wavelength = yarn.original_context / (rotations * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = (high - low) or 0.001  # equal bounds: a step, written as a very steep ramp
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / span
    return 1 - ramp.clamp(0, 1)
