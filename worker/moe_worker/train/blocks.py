"""Layers as they are trained (models/layers.py): parameters, autograd, dropout and rounding with gradients.

Norm, routing and the order of a layer are those of serving. Attention is not: serving absorbs projections and
keeps a cache, and training computes large matrix products over whole sequences.

Legend: B sequences, T tokens, D hidden size, H heads, E routed experts, F expert channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import nn

from moe_worker.compress.w4a8 import round_tokens
from moe_worker.config import ModelConfig
from moe_worker.kernels.reference import rms_norm
from moe_worker.models.layers import Layer, Residual, through_experts
from moe_worker.models.mla import INNER_NORM_EPS
from moe_worker.moe.dispatch import LOCAL
from moe_worker.moe.router import choose, scores
from moe_worker.quant.int8 import WHOLE_PIECE, piece_of
from moe_worker.train.experts import chosen, expert_outputs, sequence_balance
from moe_worker.train.specialise import cost, domain_loss


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        return rms_norm(x, self.weight.to(x.dtype), self.epsilon)


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
    """A matrix without bias; `round_tokens` rounds its inputs as int8 kernels do.

    piece: inputs that share a scale; None: the default of quant.int8. parts: equal parts of the inputs that
    are separate rows when the model is served.
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
    """Multi-head latent attention with expanded keys and values."""

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

    def forward(self, x_BTD: torch.Tensor, _step: None = None) -> torch.Tensor:
        """Each token attends to itself and those before it."""
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
    """SwiGLU (arXiv 2002.05202); `experts`: number of experts that serving splits it into, None for a dense
    block.
    """

    def __init__(self, hidden: int, inner: int, experts: int | None = None) -> None:
        super().__init__()
        self.gate_proj = Projection(hidden, inner)
        self.up_proj = Projection(hidden, inner)
        piece = WHOLE_PIECE if experts is None else None
        self.down_proj = Projection(inner, hidden, piece, parts=experts or 1)

    def forward(self, x: torch.Tensor, _step: None = None) -> torch.Tensor:
        """Applies the network to the last axis."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MixtureOfExperts(nn.Module):
    """Shared experts for every token, and `num_experts_per_tok` of the routed ones."""

    round_tokens = False
    bias_E: torch.Tensor
    load_E: torch.Tensor
    kept_load_E: torch.Tensor
    cut: torch.Tensor
    sequence_loss: torch.Tensor
    router_loss: torch.Tensor

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
        self.register_buffer("kept_load_E", torch.ones(experts), persistent=False)
        self.register_buffer("cut", torch.ones(()), persistent=False)
        self.register_buffer("sequence_loss", torch.zeros(()), persistent=False)
        self.register_buffer("router_loss", torch.zeros(()), persistent=False)
        self.cost_share, self.hint_share = 0.0, 0.0
        self.hint: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x_BTD: torch.Tensor, _step: None = None) -> torch.Tensor:
        """Sums the shared experts and the chosen ones; counts the choices while training."""
        chosen_BTK, weight_BTK, scores_BTE = self.route(x_BTD)
        if self.training:
            self.load_E.add_(chosen(scores_BTE, chosen_BTK).sum((0, 1)))
            self.sequence_loss = sequence_balance(scores_BTE, chosen_BTK)
            self.router_loss = self._router_loss(scores_BTE)
        choice = chosen_BTK.flatten(0, 1), weight_BTK.flatten(0, 1)
        routed_TD = through_experts(x_BTD.flatten(0, 1), choice, self._experts, LOCAL)
        shared: torch.Tensor = self.shared(x_BTD)
        return routed_TD.view(x_BTD.shape) + shared

    def _experts(self, x_TD: torch.Tensor, chosen_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        weights = self.gate_EFD, self.up_EFD, self.down_EDF
        return expert_outputs(x_TD, weights, (chosen_TK, weight_TK), self.round_tokens)

    def _router_loss(self, scores_BTE: torch.Tensor) -> torch.Tensor:
        """The cost of experts, and the distance to the groups of the domains of tokens, if known."""
        loss = scores_BTE.new_zeros(())
        if self.cost_share:
            loss = loss + self.cost_share * self.cut * cost(scores_BTE, self.config.moe.top_k)
        if self.hint_share and self.hint is not None:
            loss = loss + self.hint_share * domain_loss(scores_BTE, *self.hint)
        return loss

    def route(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns each token's experts [B, T, K], their weights and all scores [B, T, E], both float32.

        The balancing bias affects only the choice (moe/router.py).
        """
        routing = self.config.moe.routing
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores_BTE = scores(F.linear(x_BTD.float(), self.router_ED.float()), routing)
        mass = 1 - self.cut * (1 - routing.mass)
        chosen_TK, weight_TK = choose(scores_BTE.flatten(0, 1), self.bias_E, routing, mass)
        shape = (*x_BTD.shape[:2], routing.top_k)
        return chosen_TK.view(shape), weight_TK.view(shape), scores_BTE


class TrainingLayer(nn.Module):
    """A layer whose parameters have the names of Hugging Face checkpoints."""

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
        """[B, T, D] to [B, T, D]."""
        residual = Residual(x_BTD, lambda x_BTD, norm: norm.forward(x_BTD), self.dropout)
        Layer(self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp).forward(
            residual, None
        )
        return residual.x
