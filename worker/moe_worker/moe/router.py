"""Routers: scores by sigmoid or softmax; the best experts of all, or of the best groups of each level only.

DeepSeek-V3 scores groups by their two best experts and moves the choice by a load-balance bias
(arXiv:2412.19437, 2.1.2), DeepSeek-V2 by their best one (arXiv:2405.04434, 2.1.4).

Legend: T tokens, D hidden, E routed experts, G groups, K experts of a token.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.config.moe import Level, Routing
from moe_worker.moe.counting import Choice


@dataclass(frozen=True)
class Router:
    """Weights of one layer's router in float32, and how it chooses.

    `bias_E` moves only the choice, never the weight that a chosen expert gets. `choice` has the newest one.
    """

    weight_ED: Tensor
    bias_E: Tensor | None
    routing: Routing
    choice: Choice = field(default_factory=Choice)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts, the shared ones behind the chosen, and their weights.

        int64 and float32 [T, K].
        """
        shared = self.routing.shared
        scores_TE = scores(functional.linear(x_TD.float(), self.weight_ED), self.routing)
        experts_Tk, weights_Tk = choose(scores_TE, self.bias_E, self.routing)
        self.choice.experts_TK = experts_Tk
        if not shared:
            return experts_Tk, weights_Tk
        experts_TK = torch.cat((experts_Tk, self._shared_ids.expand(x_TD.shape[0], -1)), dim=1)
        return experts_TK, functional.pad(weights_Tk, (0, shared), value=1.0)

    @cached_property
    def _shared_ids(self) -> Tensor:
        first, device = self.routing.experts, self.weight_ED.device
        return torch.arange(first, first + self.routing.shared, device=device)


def scores(logits_TE: Tensor, routing: Routing) -> Tensor:
    """What the router's logits say of each expert, in float32."""
    return logits_TE.softmax(dim=-1) if routing.softmax else logits_TE.sigmoid()


def choose(
    scores_TE: Tensor, bias_E: Tensor | None, routing: Routing, mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best experts of each token, int64 [T, top_k], and their weights; gradients flow through these.

    Where the routing is dynamic, experts stand best first, and -1 with weight 0 behind those that it takes.
    mass: a scalar in place of the routing's, for training.
    """
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    for level in routing.limits:
        choice_TE = _mask_groups(choice_TE, level)
    experts_TK = choice_TE.topk(routing.top_k, dim=-1, sorted=routing.is_dynamic).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    if routing.is_dynamic:
        left_TK = ~within_mass(weights_TK.detach(), routing.mass if mass is None else mass)
        experts_TK, weights_TK = experts_TK.masked_fill(left_TK, -1), weights_TK.masked_fill(left_TK, 0)
    if routing.normalise:
        # 1e-20 as in DeepSeek's code: all scores can underflow to 0.
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return experts_TK, weights_TK * routing.scale


def within_mass(scores_TK: Tensor, mass: float | Tensor) -> Tensor:
    """Which of a token's experts, best first, are needed for a share `mass` of its scores: bool [T, K].

    The first one always is. A token whose scores are not numbers keeps all: it fails as it would otherwise.
    """
    before_TK = scores_TK.cumsum(dim=-1) - scores_TK
    needed_TK = ~(before_TK >= mass * scores_TK.sum(dim=-1, keepdim=True))
    needed_TK[:, 0] = True
    return needed_TK


def _mask_groups(choice_TE: Tensor, level: Level) -> Tensor:
    """Sets the experts outside the level's best groups to -inf."""
    # A rank of a mesh may have no tokens, so that no size can be inferred.
    tokens, experts = choice_TE.shape
    choice_TGe = choice_TE.view(tokens, level.groups, experts // level.groups)
    groups_TG = choice_TGe.topk(level.best, dim=-1, sorted=False).values.sum(dim=-1)
    kept_Tg = groups_TG.topk(level.keep, dim=-1, sorted=False).indices
    dropped_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, kept_Tg, False)
    return choice_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)
