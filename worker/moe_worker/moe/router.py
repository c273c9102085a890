"""Routers: scores by sigmoid or softmax; the best experts of all, or of the best groups only.

DeepSeek-V3 scores groups by their two best experts and moves the choice by a load-balance bias
(arXiv:2412.19437, 2.1.2), DeepSeek-V2 by their best one (arXiv:2405.04434, 2.1.4).

Legend: T tokens, D hidden, E routed experts, G groups, K experts chosen for a token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.config.moe import Method, MoeConfig, Scoring
from moe_worker.moe.counting import Choice


@dataclass(frozen=True)
class Router:
    """Weights of one layer's router in float32, and how it chooses.

    `bias_E` moves only the choice, never the weight that a chosen expert gets. `choice` has the newest one.
    """

    weight_ED: Tensor
    bias_E: Tensor | None
    config: MoeConfig
    choice: Choice = field(default_factory=Choice)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token goes to (int64 [T, K]) and with which weights (float32 [T, K])."""
        scores_TE = self._scores(functional.linear(x_TD.float(), self.weight_ED))
        choice_TE = scores_TE if self.bias_E is None else scores_TE + self.bias_E
        if self.config.method is not Method.GREEDY and self.config.kept_groups < self.config.groups:
            choice_TE = self._mask_groups(choice_TE)
        experts_TK = choice_TE.topk(self.config.top_k, dim=-1, sorted=False).indices
        self.choice.experts_TK = experts_TK
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.config.normalise:
            # 1e-20 as in DeepSeek's code: all scores can underflow to 0.
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return experts_TK, weights_TK * self.config.scale

    def _scores(self, logits_TE: Tensor) -> Tensor:
        if self.config.scoring is Scoring.SIGMOID:
            return logits_TE.sigmoid_()
        return logits_TE.softmax(dim=-1)

    def _mask_groups(self, choice_TE: Tensor) -> Tensor:
        """Sets the experts outside the best groups to -inf; a group scores by its best one or two experts."""
        best = 2 if self.config.method is Method.GROUP_PAIR else 1
        choice_TGe = choice_TE.view(choice_TE.shape[0], self.config.groups, -1)
        groups_TG = choice_TGe.topk(best, dim=-1, sorted=False).values.sum(dim=-1)
        kept_Tg = groups_TG.topk(self.config.kept_groups, dim=-1, sorted=False).indices
        dropped_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, kept_Tg, False)
        return choice_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)
