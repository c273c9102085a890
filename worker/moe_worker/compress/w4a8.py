"""Quantization-aware training: int4 weights, int8 activations, int8 W_UK and W_UV, straight-through.

The forward pass rounds numbers exactly as they will be stored and multiplied, except the inputs of W_UK
and W_UV, which engines round to bfloat16. In the backward pass, rounding is the identity within the range
and has no gradient outside it (the straight-through estimator, Bengio et al., arXiv 1308.3432). The range
of each group is initialized by a search for the least squared error and learned from then on (Esser et
al., arXiv 1902.08153). Repeating the search during training was tried: when the range of a group changed
at once, all its weights did, and training ended worse than plain rounding.

Legend: O outputs, I inputs, G groups of inputs, R latent rank; leading axes (experts) are allowed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_worker.quant.int4 import GROUP, HIGHEST, Int4Weight, cut_groups, pack, round_values, search_scales
from moe_worker.quant.int8 import round_columns, round_pieces

# Scales are rounded to what a checkpoint stores before weights are rounded by them: what was trained is
# what is served, to the bit.
SCALE_DTYPE = torch.bfloat16


def round_tokens(x: Tensor, piece: int) -> Tensor:
    """x rounded as by int8 kernels, with the gradient of x; piece: values that share a scale."""
    with torch.no_grad():
        rounded = round_pieces(x, piece).to(x.dtype)
    return x + (rounded - x).detach()


def round_heads(weight_OR: Tensor, heads: int, plain: int) -> Tensor:
    """kv_b_proj rounded as W_UK (the first `plain` rows of a head) and W_UV; gradients go to it."""
    with torch.no_grad():
        key_HNR, value_HVR = weight_OR.unflatten(0, (heads, -1)).tensor_split([plain], dim=1)
        rounded_HOR = torch.cat((round_columns(key_HNR, 1), round_columns(value_HVR, 2)), dim=1)
    return weight_OR + (rounded_HOR.flatten(0, 1) - weight_OR).detach()


def round_weight(weight: Tensor, scales_OG: Tensor, group: int) -> Tensor:
    """weight rounded to int4, float32 [..., O, I]; gradients go to it and to its scales."""
    scales = _storable(scales_OG).unsqueeze(-1)
    scaled = (cut_groups(weight, group) / scales).clamp(-HIGHEST, HIGHEST)
    whole = scaled + (scaled.round() - scaled).detach()
    rounded: Tensor = (whole * scales).flatten(-2)[..., : weight.shape[-1]]
    return rounded


def pack_weight(weight: Tensor, scales_OG: Tensor, group: int) -> Int4Weight:
    """The result of `round_weight`, packed: values times scales in float32 equal it to the bit."""
    scales_OG = _storable(scales_OG.detach())
    values = round_values(weight.detach(), scales_OG, group)
    return Int4Weight(pack(values), scales_OG.to(SCALE_DTYPE), None, weight.shape[-1], group)


class Int4Trainer(nn.Module):
    """Ranges of named weights, searched at step `first` and learned from then on.

    Its parameters are the logarithms of the changes of the scales; they need a tenth of the learning rate of
    the weights and no decay. Its state is part of the state of a run.
    """

    def __init__(self, weights: Mapping[str, Tensor], first: int, group: int = GROUP) -> None:
        super().__init__()
        self.group, self.first = group, first
        self._names = {name: name.replace(".", "-") for name in weights}
        for name, weight in weights.items():
            shape = (*weight.shape[:-1], -(-weight.shape[-1] // group))
            self.register_buffer(f"start-{self._names[name]}", torch.ones(shape, device=weight.device))
            moved = nn.Parameter(torch.zeros(shape, device=weight.device))
            self.register_parameter(f"moved-{self._names[name]}", moved)

    @property
    def names(self) -> frozenset[str]:
        """The weights that are rounded."""
        return frozenset(self._names)

    def is_active(self, step: int) -> bool:
        """Whether `step` computes with rounded weights."""
        return step >= self.first

    @torch.no_grad()
    def update(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Searches the ranges before `step` if it is the first step that rounds."""
        if step == self.first:
            for name, key in self._names.items():
                self.get_buffer(f"start-{key}").copy_(
                    search_scales(weights[name].detach(), self.group, SCALE_DTYPE)
                )

    def round_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named weights, rounded to int4."""
        return {name: round_weight(weights[name], self.scales(name), self.group) for name in self._names}

    def scales(self, name: str) -> Tensor:
        """The scales of one weight, float32 [..., O, G]."""
        key = self._names[name]
        scales: Tensor = self.get_buffer(f"start-{key}") * self.get_parameter(f"moved-{key}").exp()
        return scales


def _storable(scales: Tensor) -> Tensor:
    """Scales rounded as a checkpoint stores them, with a straight-through gradient."""
    return scales + (scales.to(SCALE_DTYPE).float() - scales).detach()
