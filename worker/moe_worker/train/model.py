"""DeepSeek-V3 (arXiv 2412.19437) as it is trained: plain attention, experts in grouped products.

The worker's own model absorbs projections and keeps a cache, which is what decoding wants; training wants
large matrix products. train/experts.py says how the experts are computed.

Legend: B sequences, T tokens, D hidden size, H heads, E routed experts, F expert channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import nn

from moe_worker.compress.distillation import TeacherView, distilled_loss
from moe_worker.compress.w4a8 import round_tokens
from moe_worker.config import ModelConfig
from moe_worker.models.mla import INNER_NORM_EPS
from moe_worker.moe.router import choose, scores
from moe_worker.quant.int8 import WHOLE_PIECE, piece_of
from moe_worker.train.experts import chosen, expert_outputs, sequence_balance


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)


def rotate(x_BHTR: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotates neighbouring pairs of the last axis by their position (RoPE, arXiv 2104.09864)."""
    tokens, size = x_BHTR.shape[-2:]
    device = x_BHTR.device
    frequencies = theta ** -(torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles_TR = torch.outer(torch.arange(tokens, device=device, dtype=torch.float32), frequencies)
    cos, sin = angles_TR.cos(), angles_TR.sin()
    even, odd = torch.unflatten(x_BHTR.float(), -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x_BHTR.dtype)


class Projection(nn.Linear):
    """A matrix without bias; `round_tokens` makes its inputs what int8 kernels will see.

    piece: inputs that share a scale then; None: as quant.int8 has it for all inputs. parts: rows one behind
    the other that its inputs are when it is served.
    """

    round_tokens = False

    def __init__(self, inputs: int, outputs: int, piece: int | None = None, parts: int = 1) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.piece, self.parts = piece or piece_of(inputs // parts), parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        return F.linear(self._rounded(x) if self.round_tokens else x, self.weight)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return round_tokens(x.unflatten(-1, (self.parts, -1)), self.piece).flatten(-2)


class TrainingAttention(nn.Module):
    """Multi-head latent attention, keys and values written out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.latent.num_attention_heads, config.hidden_size
        query = heads * (config.latent.qk_nope_head_dim + config.latent.qk_rope_head_dim)
        if config.latent.q_lora_rank is None:
            self.q_proj = Projection(hidden, query)
        else:
            self.q_a_proj = Projection(hidden, config.latent.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.latent.q_lora_rank, INNER_NORM_EPS)
            self.q_b_proj = Projection(config.latent.q_lora_rank, query)
        self.kv_a_proj_with_mqa = Projection(hidden, config.latent.cache_width)
        self.kv_a_layernorm = RMSNorm(config.latent.kv_lora_rank, INNER_NORM_EPS)
        per_head = config.latent.qk_nope_head_dim + config.latent.v_head_dim
        self.kv_b_proj = nn.Linear(config.latent.kv_lora_rank, heads * per_head, bias=False)
        width = config.latent.v_head_dim
        self.o_proj = Projection(heads * width, hidden, piece_of(width))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Lets each token look at itself and those before it."""
        c = self.config.latent
        nope, rope, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.num_attention_heads
        q_BHTQ = torch.unflatten(self._query(x_BTD), -1, (heads, -1)).transpose(1, 2)
        q_nope, q_rope = torch.split(q_BHTQ, [nope, rope], -1)
        latent_BTL, k_rope = torch.split(self.kv_a_proj_with_mqa(x_BTD), [c.kv_lora_rank, rope], -1)
        kv_BTK = self.kv_b_proj(self.kv_a_layernorm(latent_BTL))
        kv_BHTK = torch.unflatten(kv_BTK, -1, (heads, -1)).transpose(1, 2)
        k_nope, v_BHTW = torch.split(kv_BHTK, [nope, c.v_head_dim], -1)
        k_rope = rotate(k_rope.unsqueeze(1), c.rope.theta).expand(-1, heads, -1, -1)
        out_BHTW = F.scaled_dot_product_attention(
            torch.cat((q_nope, rotate(q_rope, c.rope.theta)), -1),
            torch.cat((k_nope, k_rope), -1),
            v_BHTW,
            is_causal=True,
        )
        out: torch.Tensor = self.o_proj(out_BHTW.transpose(1, 2).flatten(-2))
        return out

    def _query(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.config.latent.q_lora_rank is None:
            query: torch.Tensor = self.q_proj(x_BTD)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        return query


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202); `experts`: how many it is served as, None for a dense block."""

    def __init__(self, hidden: int, inner: int, experts: int | None = None) -> None:
        super().__init__()
        self.gate_proj = Projection(hidden, inner)
        self.up_proj = Projection(hidden, inner)
        piece = WHOLE_PIECE if experts is None else None
        self.down_proj = Projection(inner, hidden, piece, parts=experts or 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the network to the last axis."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MixtureOfExperts(nn.Module):
    """Shared experts for every token, `num_experts_per_tok` of the routed ones for each."""

    round_tokens = False
    bias_E: torch.Tensor
    load_E: torch.Tensor
    sequence_loss: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        experts, inner, hidden = config.moe.routed, config.moe.intermediate, config.hidden_size
        self.router_ED = nn.Parameter(torch.empty(experts, hidden))
        self.gate_EFD = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_EFD = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_EDF = nn.Parameter(torch.empty(experts, hidden, inner))
        self.shared = FeedForward(hidden, inner * config.moe.shared, config.moe.shared)
        self.register_buffer("bias_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)
        self.register_buffer("sequence_loss", torch.zeros(()), persistent=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Adds up the shared experts and the chosen ones; counts the choices while training."""
        chosen_BTK, weight_BTK, scores_BTE = self.route(x_BTD)
        if self.training:
            self.load_E.add_(chosen(scores_BTE, chosen_BTK).sum((0, 1)))
            self.sequence_loss = sequence_balance(scores_BTE, chosen_BTK)
        routed_TD = expert_outputs(
            x_BTD.flatten(0, 1),
            (self.gate_EFD, self.up_EFD, self.down_EDF),
            (chosen_BTK.flatten(0, 1), weight_BTK.flatten(0, 1)),
            self.round_tokens,
        )
        shared: torch.Tensor = self.shared(x_BTD)
        return routed_TD.view(x_BTD.shape) + shared

    def route(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns each token's experts [B, T, K], their weights and all scores [B, T, E], both float32.

        The balancing bias takes part in the choice alone (moe/router.py).
        """
        routing = self.config.moe.routing
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores_BTE = scores(F.linear(x_BTD.float(), self.router_ED.float()), routing)
        chosen_TK, weight_TK = choose(scores_BTE.flatten(0, 1), self.bias_E, routing)
        shape = (*x_BTD.shape[:2], routing.top_k)
        return chosen_TK.view(shape), weight_TK.view(shape), scores_BTE


class TrainingLayer(nn.Module):
    """Attention and feed-forward, each after a norm and with a residual connection."""

    def __init__(self, config: ModelConfig, index: int, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = TrainingAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index in config.dense_layers
        self.mlp: FeedForward | MixtureOfExperts = (
            FeedForward(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Adds what attention and the feed-forward network find to the residual stream."""
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD)))
        out: torch.Tensor = x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))
        return out


class TrainingModel(nn.Module):
    """The whole model; `forward` gives the loss.

    sequence_share: of the loss of unbalanced sequences in it (arXiv 2412.19437, 2.1.2).
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

    @property
    def mixtures(self) -> list[MixtureOfExperts]:
        """The layers' mixtures of experts, in order."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def forward(
        self, input_BT: torch.Tensor, target_BT: torch.Tensor, teacher: TeacherView | None = None
    ) -> torch.Tensor:
        """Returns the mean negative log-likelihood in nats, float32; targets of -1 do not count.

        While training, what a teacher adds and the loss of unbalanced sequences are part of it.
        """
        loss: torch.Tensor = self.head_loss(self.hidden(input_BT), target_BT, teacher)
        if self.training:
            loss = loss + self.sequence_share * self._sequence_loss()
        return loss

    def _sequence_loss(self) -> torch.Tensor:
        """Summed over layers. What stays behind has no gradient: a compiled layer would be compiled again."""
        total = torch.zeros((), device=self.embed_tokens.weight.device)
        for mixture in self.mixtures:
            total = total + mixture.sequence_loss
            mixture.sequence_loss = mixture.sequence_loss.detach()
        return total

    def _head_loss(
        self, hidden_BTD: torch.Tensor, target_BT: torch.Tensor, teacher: TeacherView | None
    ) -> torch.Tensor:
        logits_BTV = self.lm_head(self.norm(hidden_BTD))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=-1)
        return loss if teacher is None else distilled_loss(loss, logits_BTV, hidden_BTD, teacher)

    def compile_parts(self, **options: Any) -> None:
        """Compiles a layer, which serves for all of its kind, and the loss: much less work than the whole.

        What was compiled before, for other models of this process, is forgotten: it would count against the
        number of versions of one function that torch keeps. `options`: of torch.compile.
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
        """Whether what enters projections and experts is rounded to int8, anew for each token."""
        for module in self.modules():
            if isinstance(module, Projection | MixtureOfExperts):
                module.round_tokens = on

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Moves each expert's bias by `speed` towards an even load since the last call.

        Source: Wang et al., "Auxiliary-loss-free load balancing", arXiv 2408.15664.
        """
        for mixture in self.mixtures:
            mixture.bias_E.add_(torch.sign(mixture.load_E.mean() - mixture.load_E), alpha=speed)
            mixture.load_E.zero_()

    def imbalance(self) -> float:
        """Returns the load of the busiest expert over the mean load, the worst of all layers."""
        ratios = [float(m.load_E.max() / m.load_E.mean().clamp(min=1)) for m in self.mixtures]
        return max(ratios, default=1.0)
