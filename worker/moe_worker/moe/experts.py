"""The experts of one layer; shared experts stand behind the routed ones and every token takes them.

Legend: T tokens, D hidden, I intermediate of one expert, F = 2 * I (gate, then up), A all experts, K experts
a token (the chosen ones, then the shared ones), M = T * K rows, one for each token and expert.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.linear import grouped_matrix
from moe_worker.kernels.reference import swiglu
from moe_worker.quant.matrix import Matrix

_Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Experts:
    """SwiGLU experts, stacked; a shared block of S * I intermediate values is S experts that add up.

    round_tokens: whether activations are rounded to int8 before they meet weights of four bits.
    """

    gate_up_AFD: Matrix
    down_ADI: Matrix
    shared: int
    round_tokens: bool = False

    @property
    def count(self) -> int:
        """Experts in all, A."""
        return self.down_ADI.count

    def forward(self, x_TD: Tensor, routed_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, plus the shared ones with weight 1; [T, D] in x's dtype."""
        first_shared = self.count - self.shared
        if x_TD.shape[0] == 1 and x_TD.device.type == "cpu" and self._views is not None:
            experts = [*routed_TK[0].tolist(), *range(first_shared, first_shared + self.shared)]
            return self._one_token(
                self._views, x_TD[0], experts, functional.pad(weights_TK[0], (0, self.shared), value=1.0)
            )
        shared_TS = torch.arange(first_shared, first_shared + self.shared, device=x_TD.device)
        experts_TK = torch.cat((routed_TK, shared_TS.expand(x_TD.shape[0], -1)), dim=1)
        return self._grouped(x_TD, experts_TK, functional.pad(weights_TK, (0, self.shared), value=1.0))

    @cached_property
    def _views(self) -> _Views | None:
        """Each expert's dense matrices, made once: slicing them anew costs a token 14 us a layer."""
        gate_up, down = self.gate_up_AFD.dense, self.down_ADI.dense
        return None if gate_up is None or down is None else (gate_up.unbind(0), down.unbind(0))

    def _one_token(self, views: _Views, x_D: Tensor, experts: list[int], weights_K: Tensor) -> Tensor:
        """Reads the experts' weights where they lie: gathering them first takes four times as long."""
        gate_up, down = views
        gate_up_KF = torch.stack([torch.mv(gate_up[expert], x_D) for expert in experts])
        hidden_KI = swiglu(gate_up_KF) * weights_K.to(x_D.dtype).unsqueeze(1)
        out_D = torch.zeros_like(x_D)
        for expert, hidden_I in zip(experts, hidden_KI.unbind(0), strict=True):
            out_D.addmv_(down[expert], hidden_I)
        return out_D.unsqueeze(0)

    def _grouped(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """One product for each expert, over the rows of all tokens that go to it."""
        tokens, per_token = experts_TK.shape
        experts_M, order_M = experts_TK.flatten().sort(stable=True)
        ends_A = torch.searchsorted(
            experts_M, torch.arange(self.count, device=x_TD.device), right=True, out_int32=True
        )
        rows_MD = x_TD.index_select(0, order_M // per_token)
        hidden_MI = swiglu(grouped_matrix(rows_MD, self.gate_up_AFD, ends_A, self.round_tokens))
        sorted_MD = grouped_matrix(hidden_MI, self.down_ADI, ends_A, self.round_tokens)
        out_MD = torch.empty_like(sorted_MD).index_copy_(0, order_M, sorted_MD)
        return torch.einsum("tkd,tk->td", out_MD.view(tokens, per_token, -1), weights_TK.to(x_TD.dtype))
