"""DeepSeek-V3 (arXiv 2412.19437) as it is trained: plain attention, every expert computed at once.

The worker's own model absorbs projections and skips experts, which is what decoding wants. Training
wants large matrix products: the experts of a layer are one wide feed-forward network whose inner
channels are multiplied by the router's weight, zero for an expert that was not chosen. That is the same
function; its cost grows with all experts, which suits models of a few million parameters (docs/adr/0007).

Legend: B sequences, T tokens, D hidden size, H heads, E routed experts, F expert channels, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import nn

from moe_worker.config import ModelConfig
from moe_worker.errors import CheckpointError
from moe_worker.models.mla import INNER_NORM_EPS


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


class Attention(nn.Module):
    """Multi-head latent attention, keys and values written out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.latent.num_attention_heads, config.hidden_size
        query = heads * (config.latent.qk_nope_head_dim + config.latent.qk_rope_head_dim)
        if config.latent.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.latent.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.latent.q_lora_rank, INNER_NORM_EPS)
            self.q_b_proj = nn.Linear(config.latent.q_lora_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent.cache_width, bias=False)
        self.kv_a_layernorm = RMSNorm(config.latent.kv_lora_rank, INNER_NORM_EPS)
        per_head = config.latent.qk_nope_head_dim + config.latent.v_head_dim
        self.kv_b_proj = nn.Linear(config.latent.kv_lora_rank, heads * per_head, bias=False)
        self.o_proj = nn.Linear(heads * config.latent.v_head_dim, hidden, bias=False)

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
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the network to the last axis."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MixtureOfExperts(nn.Module):
    """Shared experts for every token, `num_experts_per_tok` of the routed ones for each."""

    bias_E: torch.Tensor
    load_E: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        experts, inner, hidden = config.moe.routed, config.moe.intermediate, config.hidden_size
        self.router_ED = nn.Parameter(torch.empty(experts, hidden))
        self.gate_EFD = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_EFD = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_EDF = nn.Parameter(torch.empty(experts, hidden, inner))
        self.shared = FeedForward(hidden, inner * config.moe.shared)
        self.register_buffer("bias_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Adds up the shared experts and the chosen ones; counts the choices while training."""
        weight_BTE = self.route(x_BTD)
        if self.training:
            self.load_E.add_((weight_BTE > 0).sum((0, 1)))
        gate = F.linear(x_BTD, self.gate_EFD.flatten(0, 1).to(x_BTD.dtype))
        up = F.linear(x_BTD, self.up_EFD.flatten(0, 1).to(x_BTD.dtype))
        inner = torch.unflatten(F.silu(gate) * up, -1, (self.config.moe.routed, -1))
        weighted = (inner * weight_BTE.to(x_BTD.dtype).unsqueeze(-1)).flatten(-2)
        down = self.down_EDF.transpose(0, 1).flatten(1).to(x_BTD.dtype)
        shared: torch.Tensor = self.shared(x_BTD)
        return F.linear(weighted, down) + shared

    def route(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns each token's weight for each expert, float32 [B, T, E], zero where not chosen.

        Sigmoid scores; the balancing bias takes part in the choice alone; the best `topk_group` groups
        by the sum of their two best experts, then the best experts within (arXiv 2412.19437, 2.1.2).
        """
        c = self.config.moe
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores_BTE = F.linear(x_BTD.float(), self.router_ED.float()).sigmoid()
        choice_BTE = scores_BTE.detach() + self.bias_E
        by_group = torch.unflatten(choice_BTE, -1, (c.groups, -1))
        best_groups = by_group.topk(2, -1).values.sum(-1).topk(c.kept_groups, -1).indices
        allowed = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best_groups, value=True)
        candidates = by_group.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen_BTK = candidates.topk(c.top_k, -1).indices
        picked = scores_BTE.gather(-1, chosen_BTK)
        if c.normalise:
            picked = picked / (picked.sum(-1, keepdim=True) + 1e-20)
        return torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, picked * c.scale)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, index: int, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
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
    """The whole model; `forward` gives the loss."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, dropout) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    @property
    def mixtures(self) -> list[MixtureOfExperts]:
        """The layers' mixtures of experts, in order."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def forward(self, input_BT: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
        """Returns the mean negative log-likelihood in nats, float32; targets of -1 do not count."""
        x_BTD = self.dropout(self.embed_tokens(input_BT))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        logits_BTV = self.lm_head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=-1)

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


def checkpoint_tensors(model: TrainingModel) -> dict[str, torch.Tensor]:
    """Returns the weights under the names that Hugging Face's DeepSeek-V3 checkpoints use."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _untied(model).items():
        names = _checkpoint_names(name, model.config.moe.routed)
        tensors |= zip(names, tensor if len(names) > 1 else [tensor], strict=True)
    return tensors


def load_checkpoint_tensors(model: TrainingModel, tensors: dict[str, torch.Tensor]) -> None:
    """Sets the weights to those of a checkpoint of the same shape.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    for name, tensor in _untied(model).items():
        names = _checkpoint_names(name, model.config.moe.routed)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise CheckpointError(f"the checkpoint to start from has no {missing[0]}; it is of another shape")
        given = torch.stack([tensors[name] for name in names]) if len(names) > 1 else tensors[names[0]]
        if given.shape != tensor.shape:
            raise CheckpointError(
                f"{names[0]} of the checkpoint to start from has shape {tuple(given.shape)}, "
                f"where --config asks for {tuple(tensor.shape)}"
            )
        tensor.copy_(given)


def _untied(model: TrainingModel) -> dict[str, torch.Tensor]:
    """The state without the output head where that is the embedding itself."""
    state: dict[str, torch.Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _checkpoint_names(name: str, experts: int) -> list[str]:
    """Names in a checkpoint of what is one tensor here: one, or one an expert."""
    layer, _, kind = name.rpartition(".mlp.")
    prefix = f"model.{layer}.mlp"
    match kind:
        case "router_ED":
            return [f"{prefix}.gate.weight"]
        case "bias_E":
            return [f"{prefix}.gate.e_score_correction_bias"]
        case "gate_EFD" | "up_EFD" | "down_EDF":
            projection = kind.split("_")[0] + "_proj"
            return [f"{prefix}.experts.{expert}.{projection}.weight" for expert in range(experts)]
        case _ if name == "lm_head.weight":
            return [name]
        case _:
            return ["model." + name.replace(".mlp.shared.", ".mlp.shared_experts.")]
