"""Grouped-query attention (arXiv:2305.13245) with normalised queries and keys, as Qwen3 has it.

Legend: T tokens, D hidden, H query heads, G key heads, K elements of a head, B sequences, S positions,
W = 2 * G * K cache row: the keys of all heads, then their values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.kernels.linear import Linear
from moe_worker.kernels.reference import rms_norm
from moe_worker.models.attention import attend
from moe_worker.models.layers import LayerStep
from moe_worker.models.rope import rotate


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Weights of one layer's attention, prepared: query, key and value projections are one matrix."""

    input: Linear  # rows: H * K query, G * K key, G * K value elements
    query_norm_K: Tensor
    key_norm_K: Tensor
    output: Linear
    key_heads: int
    norm_eps: float
    scale: float

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        """Writes the tokens' keys and values to the cache and attends over it; [T, D]."""
        if not step.batch.segments:  # of a mesh's rank: it computes experts for the tokens of others only
            return x_TD
        joint_THK = self.input.forward(x_TD).view(x_TD.shape[0], -1, self.query_norm_K.shape[0])
        heads = joint_THK.shape[1] - 2 * self.key_heads
        query_THK, key_TGK, value_TGK = joint_THK.tensor_split([heads, heads + self.key_heads], dim=1)
        query_THK = rotate(rms_norm(query_THK, self.query_norm_K, self.norm_eps), step.rotations_T1P)
        key_TGK = rotate(rms_norm(key_TGK, self.key_norm_K, self.norm_eps), step.rotations_T1P)
        step.cache.write(step.layer, step.batch.rows_T, torch.cat((key_TGK, value_TGK), dim=1).flatten(1))
        return self.output.forward(attend(query_THK, self._cut, step, self.scale).flatten(1))

    def _cut(self, rows_BSW: Tensor) -> tuple[Tensor, Tensor]:
        keys_BSGK, values_BSGK = rows_BSW.view(*rows_BSW.shape[:2], 2, self.key_heads, -1).unbind(2)
        return keys_BSGK.transpose(1, 2), values_BSGK.transpose(1, 2)
