"""DeepSeek-V3 (arXiv 2412.19437) in training: the loss, and updates between steps.

Legend: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import nn

from moe_worker.compress.distillation import TeacherView, distilled_loss
from moe_worker.config import ModelConfig
from moe_worker.moe.balance import nudge
from moe_worker.train.blocks import MixtureOfExperts, Projection, RMSNorm, TrainingLayer
from moe_worker.train.specialise import bias_step

# Share of an expert's average load that a step keeps, where the coefficient balances.
LOAD_KEPT = 0.9


class TrainingModel(nn.Module):
    """The whole model; `forward` returns the loss.

    sequence_share: weight of the sequence balance loss (arXiv 2412.19437, 2.1.2).
    """

    def __init__(self, config: ModelConfig, dropout: float, sequence_share: float = 0.0) -> None:
        super().__init__()
        self.config, self.sequence_share = config, sequence_share
        self.head_loss = self._head_loss
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TrainingLayer(config, i, dropout) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = Projection(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def specialise(self, cost_share: float, hint_share: float) -> None:
        """Sets the weights of the routers' own losses (train/specialise.py)."""
        for mixture in self.mixtures:
            mixture.cost_share, mixture.hint_share = cost_share, hint_share

    def cut(self, share: float) -> None:
        """Cuts a share, 0 to 1, of what the mass of config.json leaves out; the cost has that weight."""
        for mixture in self.mixtures:
            mixture.cut.fill_(share)

    def hint(self, groups_NG: torch.Tensor, domains_BT: torch.Tensor) -> None:
        """Tells the routers the domains of the next inputs, int64 (-1: unknown), and their groups, bool."""
        for mixture in self.mixtures:
            mixture.hint = groups_NG, domains_BT

    @property
    def mixtures(self) -> list[MixtureOfExperts]:
        """The layers' mixtures of experts, in order."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def forward(
        self, input_BT: torch.Tensor, target_BT: torch.Tensor, teacher: TeacherView | None = None
    ) -> torch.Tensor:
        """Returns the mean negative log-likelihood in nats, float32; targets of -1 do not count.

        In training it includes the distillation loss and the sequence balance loss.
        """
        loss: torch.Tensor = self.head_loss(self.hidden(input_BT), target_BT, teacher)
        if self.training:
            loss = loss + self.sequence_share * self._collected("sequence_loss")
            loss = loss + self._collected("router_loss")
        return loss

    def _collected(self, name: str) -> torch.Tensor:
        """The sum over layers. Stored losses are detached: otherwise layers would be compiled again."""
        total = torch.zeros((), device=self.embed_tokens.weight.device)
        for mixture in self.mixtures:
            loss: torch.Tensor = getattr(mixture, name)
            total = total + loss
            setattr(mixture, name, loss.detach())
        return total

    def _head_loss(
        self, hidden_BTD: torch.Tensor, target_BT: torch.Tensor, teacher: TeacherView | None
    ) -> torch.Tensor:
        logits_BTV = self.lm_head(self.norm(hidden_BTD))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=-1)
        return loss if teacher is None else distilled_loss(loss, logits_BTV, hidden_BTD, teacher)

    def compile_parts(self, **options: Any) -> None:
        """Compiles a layer, which serves all layers of its kind, and the loss: much less work than the whole.

        Earlier compilations of this process are dropped: they would count against the number of versions of
        one function that torch keeps. `options`: of torch.compile.
        """
        torch.compiler.reset()
        for layer in self.layers:
            layer.compile(**options)
        self.head_loss = torch.compile(self._head_loss, **options)

    def hidden(self, input_BT: torch.Tensor) -> torch.Tensor:
        """The last hidden states, [B, T, D], before the last norm."""
        x_BTD: torch.Tensor = self.dropout(self.embed_tokens(input_BT))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD

    @torch.no_grad()
    def logits(self, input_BT: torch.Tensor) -> torch.Tensor:
        """Scores of the next tokens, [B, T, V], without gradients."""
        logits: torch.Tensor = self.lm_head(self.norm(self.hidden(input_BT)))
        return logits

    def round_activations(self, on: bool) -> None:
        """Sets whether inputs of projections and experts are rounded to int8, dynamically per token."""
        for module in self.modules():
            if isinstance(module, Projection | MixtureOfExperts):
                module.round_tokens = on

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Moves each expert's bias by `speed` towards an even load since the last call, of each level where
        there are several; groups that a hint leads domains to keep theirs.
        """
        for mixture in self.mixtures:
            levels = mixture.config.moe.routing.levels
            levels = levels[int(mixture.hint_share > 0) :] if len(levels) > 1 else ()
            mixture.bias_E.add_(bias_step(mixture.load_E, levels), alpha=speed)
            mixture.load_E.zero_()

    @torch.no_grad()
    def balance_by_coefficient(self, strength: float) -> None:
        """Sets each expert's bias by its coefficient, 1 / (load + eps), over the last steps: the scores of an
        expert with more than the mean load count less. `strength`: the bias of an expert without load.
        """
        for mixture in self.mixtures:
            mixture.kept_load_E.lerp_(mixture.load_E / mixture.load_E.mean().clamp(min=1), 1 - LOAD_KEPT)
            mixture.bias_E.copy_(nudge(mixture.kept_load_E, 1.0, 1.0))
            mixture.bias_E.sub_(mixture.bias_E.mean()).mul_(strength)
            mixture.load_E.zero_()

    def imbalance(self) -> float:
        """Returns the load of the busiest expert over the mean load, the worst of all layers."""
        ratios = [float(m.load_E.max() / m.load_E.mean().clamp(min=1)) for m in self.mixtures]
        return max(ratios, default=1.0)
