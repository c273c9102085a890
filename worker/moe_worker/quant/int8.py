"""Eight bits in the format w4a8: activations, rounded for each token and piece of inputs, and W_UK and W_UV.

This module defines what the format does to them; docs/formats.md describes it. The trainer and plain torch
compute with these functions, and the kernels are tested against them.

Legend: T tokens, I inputs, X pieces.
"""

import torch
from torch import Tensor
from torch.nn import functional

PIECE, WHOLE_PIECE = 64, 128


def piece_of(width: int) -> int:
    """Inputs that share the scale of an int8 activation of `width`: 128 if it divides `width`, else 64.

    `width` is that of a row, or of what repeats along it: for the output of attention, the values of a head.
    """
    return WHOLE_PIECE if width % WHOLE_PIECE == 0 else PIECE


def quantize_pieces(x_TI: Tensor, piece: int) -> tuple[Tensor, Tensor]:
    """Symmetric rounding (half to even) with one scale a piece: int8 [T, I] and float32 scales [T, X].

    x is about q * scale. The scale maps the largest magnitude of a piece to 127, and is 1 for a piece of
    zeros. The last piece may be shorter. A piece with a value that is not finite gets a scale of NaN or
    infinity, which reaches every result of the token. Leading axes are allowed.
    """
    inputs, missing = x_TI.shape[-1], -x_TI.shape[-1] % piece
    whole = functional.pad(x_TI.float(), (0, missing)) if missing else x_TI.float()
    cut_TXi = whole.unflatten(-1, (-1, piece))
    largest_TX1 = cut_TXi.abs().amax(dim=-1, keepdim=True)
    scales_TX1 = torch.where(largest_TX1 == 0, torch.ones_like(largest_TX1), largest_TX1 / 127)
    values_TXi = (cut_TXi / scales_TX1).round_().clamp_(-127, 127).to(torch.int8)
    return values_TXi.flatten(-2)[..., :inputs], scales_TX1.squeeze(-1)


def round_pieces(x_TI: Tensor, piece: int) -> Tensor:
    """x as int8 products see it, float32 [T, I]."""
    values_TI, scales_TX = quantize_pieces(x_TI, piece)
    scales_TI = scales_TX.unsqueeze(-1).expand(*scales_TX.shape, piece).flatten(-2)
    return values_TI.float() * scales_TI[..., : x_TI.shape[-1]]


def quantize_columns(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Symmetric rounding (half to even) of weights with one scale for all along `axis`, a power of two: int8
    and float32 scales, in which `axis` has 1 element.

    The scale is the least that maps no magnitude beyond 127. So the products of both are exact in bfloat16,
    and rounding them again changes nothing. Values that are not finite get a scale of NaN.
    """
    largest = weight.float().abs().amax(dim=axis, keepdim=True)
    mantissa, exponent = torch.frexp(largest)
    exponent = (exponent - 7 + (mantissa > 127 / 128)).clamp_(min=-126)
    powers = (exponent + 127 << 23).view(torch.float32)  # by their bits: pow need not be exact on all devices
    scales = powers + 0 * largest
    return (weight.float() / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def round_columns(weight: Tensor, axis: int) -> Tensor:
    """Weights as `quantize_columns` rounds them, in their dtype."""
    values, scales = quantize_columns(weight, axis)
    return (values.float() * scales).to(weight.dtype)
