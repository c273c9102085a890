"""The pack-quantized layout of the compressed-tensors package (vLLM project), four bits a weight.

For each matrix NAME.weight a checkpoint holds NAME.weight_packed, int32 [O, ceil(I / 8)] with value + 8 of
input 8 w + k in bits 4 k of word w; NAME.weight_scale [O, G]; NAME.weight_shape, int64 (O, I); and where
asymmetric NAME.weight_zero_point, int32 [ceil(O / 8), G], packed along the outputs.

Legend: O outputs, I inputs, G groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.quant.int4 import Int4Weight, pack, unpack

PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
VALUES_A_WORD = 8


def to_tensors(weight: Int4Weight) -> dict[str, Tensor]:
    """The tensors of one matrix by the last part of their names."""
    tensors = {
        PACKED: _words(weight.packed_OP),
        SCALE: weight.scales_OG,
        SHAPE: torch.tensor([weight.outputs, weight.inputs]),
    }
    if weight.zeros_OG is not None:
        tensors[ZERO] = _words(pack(weight.zeros_OG.t())).t().contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], inputs: int, group: int) -> Int4Weight:
    """The inverse of `to_tensors`; shapes must have been checked."""
    scales_OG, zero = tensors[SCALE], tensors.get(ZERO)
    outputs = scales_OG.shape[0]
    zeros_OG = None if zero is None else unpack(_bytes(zero.t()), outputs).t().contiguous()
    packed_OP = _bytes(tensors[PACKED])[:, : -(-inputs // 2)].contiguous()
    return Int4Weight(packed_OP, scales_OG, zeros_OG, inputs, group)


def quantization_config(group: int, symmetric: bool, ignore: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json for such a checkpoint; `ignore` names the linear layers that are not
    quantized.
    """
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(ignore),
    }


def _words(packed: Tensor) -> Tensor:
    """Bytes of two values as words of eight; the format is little endian."""
    padded = functional.pad(packed, (0, -packed.shape[-1] % 4))
    shifts = torch.tensor([0, 8, 16, 24], device=packed.device)
    words = (padded.long().view(packed.shape[0], -1, 4) << shifts).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _bytes(words: Tensor) -> Tensor:
    """The inverse of `_words`, with its padding."""
    shifts = torch.tensor([0, 8, 16, 24], device=words.device)
    return ((words.long().unsqueeze(-1) >> shifts) & 255).to(torch.uint8).flatten(1)
