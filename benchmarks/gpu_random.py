"""Random models for GPU benchmarks and tests, made without a checkpoint."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from moe_worker.config.model import ModelConfig, parse_model_config
from moe_worker.models.build import build_model
from moe_worker.models.deepseek import DeepseekModel
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.quant.fp8 import E4M3, from_blocks
from moe_worker.quant.int4 import Int4Weight
from moe_worker.quant.matrix import Dense, Matrix
from moe_worker.quant.sparse14 import Sparse14Weight

# DeepSeek-V2-Lite with DeepSeek-V3's router: 15.7 billion parameters, about 2.4 billion active.
LARGE: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# Small, with odd sizes where they are allowed: five groups, three layers, one of them dense.
SMALL: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 500, "hidden_size": 192, "intermediate_size": 320,
    "moe_intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 6, "n_shared_experts": 2,
    "n_routed_experts": 20, "num_experts_per_tok": 3, "n_group": 5, "topk_group": 2,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5, "kv_lora_rank": 64,
    "q_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 64,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


class NoText:
    """Replaces the tokenizer: random weights generate no meaningful text."""

    def token_bytes(self, token: int) -> bytes:
        del token
        return b""


NO_TEXT = cast("Tokenizer", NoText())


@dataclass
class RandomSource:
    """Weights as large as trained ones, the same for the same seed and device, whatever the dtype.

    number_format: "dense", "fp8", "w4a16", "w4a8" or "s14" (as w4a8, layers 1:4 sparse). Packed weights
    are drawn as they are, since rounding billions of weights takes minutes.
    """

    device: torch.device
    dtype: torch.dtype
    number_format: str
    seed: int = 0
    generator: torch.Generator = field(init=False)
    round_tokens: bool = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.round_tokens = self.number_format in ("w4a8", "s14")

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.bfloat16)
        if "norm" in name:
            values = 1 + values * 0.1
        elif name.endswith("bias"):
            values = values * 0.02
        elif "embed" not in name:
            values = values * shape[-1] ** -0.5
        return values.to(dtype or self.dtype)

    def matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        if self.number_format == "dense":
            return Dense(self.take(name, outputs, inputs))
        size, device, generator = (outputs, inputs), self.device, self.generator
        if self.number_format == "fp8":
            bits = torch.randn(size, generator=generator, device=device).to(E4M3).view(torch.uint8)
            spread = (
                torch.rand(-(-outputs // 128), -(-inputs // 128), generator=generator, device=device) + 0.5
            )
            return from_blocks(bits, spread * inputs**-0.5, (128, 128))
        sparse = self.number_format == "s14" and "layers." in name
        if sparse:
            size = (outputs, inputs // 4)
        # From -7 to 7: with -8 the mean would not be zero, and all hidden states and routes would become
        # similar.
        values = torch.randint(1, 16, size, dtype=torch.uint8, generator=generator, device=device)
        packed = values[:, 0::2] | values[:, 1::2] << 4
        spread = torch.rand(outputs, -(-inputs // 128), generator=generator, device=device) + 0.5
        if sparse:
            places = (outputs, -(-inputs // 16))
            positions = torch.randint(0, 256, places, dtype=torch.uint8, generator=generator, device=device)
            return Sparse14Weight(packed, positions, spread * (inputs / 4) ** -0.5 / 4.6, inputs)
        return Int4Weight(packed, spread * inputs**-0.5 / 4.6, None, inputs)


def random_model(
    values: dict[str, Any],
    number_format: str,
    context: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> DeepseekModel:
    """A model of the configuration `values`, with positions for `context` tokens."""
    return build_model(config_of(values), RandomSource(device, dtype, number_format), context)


def config_of(values: dict[str, Any]) -> ModelConfig:
    return parse_model_config(values, "a random model")
