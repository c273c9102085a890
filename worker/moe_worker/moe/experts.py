"""The experts of one layer; shared experts follow the routed ones.

Legend: T tokens, D hidden, I intermediate of one expert, F = 2 * I (gate, then up), A all experts, K experts
a token (chosen ones, then shared ones), M = T * K rows, one for each token and expert.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_worker.kernels.linear import grouped_matrix
from moe_worker.kernels.reference import group_by_expert, swiglu
from moe_worker.quant.matrix import Matrix

_Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Experts:
    """SwiGLU experts, stacked; a shared block of S * I intermediate values is S experts.

    round_tokens: whether activations are rounded to int8 before int4 weights.
    """

    gate_up_AFD: Matrix
    down_ADI: Matrix
    round_tokens: bool = False

    @property
    def count(self) -> int:
        """Number of experts, A."""
        return self.down_ADI.count

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum over each token's experts; [T, D] in x's dtype.

        experts_TK: int64; for -1 (no expert) nothing is computed. weights_TK: float32.
        """
        if not x_TD.shape[0]:
            return x_TD
        if x_TD.shape[0] == 1 and x_TD.device.type == "cpu" and self._views is not None:
            return self._one_token(self._views, x_TD[0], experts_TK[0].tolist(), weights_TK[0])
        return self._grouped(x_TD, experts_TK, weights_TK)

    @cached_property
    def _views(self) -> _Views | None:
        """Each expert's dense matrices, cached: slicing them again costs 14 us a token and layer."""
        gate_up, down = self.gate_up_AFD.dense, self.down_ADI.dense
        return None if gate_up is None or down is None else (gate_up.unbind(0), down.unbind(0))

    def _one_token(self, views: _Views, x_D: Tensor, experts: list[int], weights_K: Tensor) -> Tensor:
        """Reads the weights in place: gathering them first takes four times as long."""
        gate_up, down = views
        if min(experts) < 0:
            kept = [place for place, expert in enumerate(experts) if expert >= 0]
            experts, weights_K = [experts[place] for place in kept], weights_K[kept]
        if not experts:
            return torch.zeros_like(x_D).unsqueeze(0)
        gate_up_KF = torch.stack([torch.mv(gate_up[expert], x_D) for expert in experts])
        hidden_KI = swiglu(gate_up_KF) * weights_K.to(x_D.dtype).unsqueeze(1)
        out_D = torch.zeros_like(x_D)
        for expert, hidden_I in zip(experts, hidden_KI.unbind(0), strict=True):
            out_D.addmv_(down[expert], hidden_I)
        return out_D.unsqueeze(0)

    def _grouped(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """One product for each expert over all its tokens."""
        tokens, per_token = experts_TK.shape
        order_M, ends_A = group_by_expert(experts_TK, self.count)
        rows_MD = x_TD.index_select(0, order_M // per_token)
        hidden_MI = swiglu(grouped_matrix(rows_MD, self.gate_up_AFD, ends_A, self.round_tokens))
        sorted_MD = grouped_matrix(hidden_MI, self.down_ADI, ends_A, self.round_tokens)
        out_MD = torch.empty_like(sorted_MD).index_copy_(0, order_M, sorted_MD)
        out_TKD = out_MD.unflatten(0, (tokens, per_token))
        # Nobody wrote the rows of no expert. Asking a GPU whether there are any would wait for it.
        none_TK = experts_TK < 0
        if none_TK.is_cuda or bool(none_TK.any()):
            out_TKD.masked_fill_(none_TK.unsqueeze(-1), 0)
        return torch.einsum("tkd,tk->td", out_TKD, weights_TK.to(x_TD.dtype))
