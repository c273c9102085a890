"""DeepSeek-V3's router: sigmoid scores, group-limited choice, load-balance bias (arXiv:2412.19437, 2.1.2).

Legend: T tokens, D hidden, E routed experts, G groups, K experts chosen for a token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.moe.counting import Choice


@dataclass(frozen=True)
class Router:
    """Weights of one layer's router in float32, and how it chooses.

    `bias_E` moves only the choice, never the weight that a chosen expert gets. `choice` has the newest one.
    """

    weight_ED: Tensor
    bias_E: Tensor
    groups: int
    kept_groups: int
    top_k: int
    normalise: bool
    scale: float
    choice: Choice = field(default_factory=Choice)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token goes to (int64 [T, K]) and with which weights (float32 [T, K])."""
        scores_TE = functional.linear(x_TD.float(), self.weight_ED).sigmoid_()
        choice_TE = scores_TE + self.bias_E
        if self.kept_groups < self.groups:
            choice_TE = self._mask_groups(choice_TE)
        experts_TK = choice_TE.topk(self.top_k, dim=-1, sorted=False).indices
        self.choice.experts_TK = experts_TK
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalise:
            # 1e-20 as in DeepSeek's code: all scores can underflow to 0.
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return experts_TK, weights_TK * self.scale

    def _mask_groups(self, choice_TE: Tensor) -> Tensor:
        """Sets the experts outside the best groups to -inf; a group scores by its two best experts."""
        choice_TGe = choice_TE.view(choice_TE.shape[0], self.groups, -1)
        groups_TG = choice_TGe.topk(2, dim=-1, sorted=False).values.sum(dim=-1)
        kept_Tg = groups_TG.topk(self.kept_groups, dim=-1, sorted=False).indices
        dropped_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, kept_Tg, False)
        return choice_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)
