"""The model's configuration, as config.json of a DeepSeek-V3 checkpoint gives it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_worker.config.fields import Fields
from moe_worker.errors import ConfigError

ARCHITECTURE = "deepseek_v3"


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv:2309.00071) with DeepSeek's two magnitude scales.

    `factor` is extended over original context length; `beta_fast` and `beta_slow` bound, in rotations over
    the original context, the ramp between frequencies that are kept and those that are divided by `factor`.
    """

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None
    truncate: bool


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are numbers of elements; the fields are named as in config.json where that name is clear."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    rms_norm_eps: float
    rope_theta: float
    rope_interleave: bool
    yarn: YarnConfig | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def num_dense_layers(self) -> int:
        """Leading layers with a plain feed-forward block instead of experts."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        """Elements of one head's query: the part without and the part with rotary position."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Values that the cache keeps for one token in one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def parameters_total(self) -> int:
        """Trained weights of the model; tied embeddings count once, the routing bias is no weight."""
        return self._parameters(self.n_routed_experts)

    @property
    def parameters_active(self) -> int:
        """Weights that one token passes through: as the total, but only the chosen routed experts."""
        return self._parameters(self.num_experts_per_tok)

    def _parameters(self, experts: int) -> int:
        d = self.hidden_size
        expert = 3 * d * self.moe_intermediate_size
        dense = 3 * d * self.intermediate_size
        moe = (experts + self.n_shared_experts) * expert + self.n_routed_experts * d
        layers = self.num_hidden_layers * (self._attention_parameters() + 2 * d)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * d
        return embeddings + layers + self.num_dense_layers * dense + self.num_moe_layers * moe + d

    def _attention_parameters(self) -> int:
        d, heads, latent = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        queries = heads * self.qk_head_dim
        rank = self.q_lora_rank
        query = d * queries if rank is None else d * rank + rank + rank * queries
        keys = d * self.latent_width + latent + latent * heads * (self.qk_nope_head_dim + self.v_head_dim)
        bias = ((rank or 0) + self.latent_width + d) if self.attention_bias else 0
        return query + keys + heads * self.v_head_dim * d + bias


def parse_model_config(
    values: Mapping[str, Any], source: str, eos_token_ids: tuple[int, ...] = ()
) -> ModelConfig:
    """Checks the parsed config.json `values` once and freezes them.

    `source` is the file that messages name; `eos_token_ids`, where given (generation_config.json has its
    own), take the place of config.json's. Raises ConfigError.
    """
    fields = Fields(source, values)
    _check_supported(fields)
    heads = fields.integer("num_attention_heads")
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size", least=2),
        hidden_size=fields.integer("hidden_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        intermediate_size=fields.integer("intermediate_size"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        first_k_dense_replace=fields.integer("first_k_dense_replace", least=0),
        n_routed_experts=fields.integer("n_routed_experts"),
        n_shared_experts=fields.integer("n_shared_experts"),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        n_group=fields.integer("n_group"),
        topk_group=fields.integer("topk_group"),
        norm_topk_prob=fields.boolean("norm_topk_prob"),
        routed_scaling_factor=fields.positive("routed_scaling_factor"),
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim", least=2),
        v_head_dim=fields.integer("v_head_dim"),
        attention_bias=fields.boolean("attention_bias", default=False),
        rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        rope_theta=_rope_theta(fields),
        rope_interleave=fields.boolean("rope_interleave", default=True),
        yarn=_parse_yarn(fields),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        bos_token_id=fields.optional_integer("bos_token_id", least=0),
        eos_token_ids=eos_token_ids or fields.integers("eos_token_id"),
    )
    _check_consistent(fields, config)
    return config


def _check_supported(fields: Fields) -> None:
    fields.choice("model_type", (ARCHITECTURE,))
    fields.choice("hidden_act", ("silu",), default="silu")
    fields.choice("scoring_func", ("sigmoid",), default="sigmoid")
    fields.choice("topk_method", ("noaux_tc",), default="noaux_tc")
    if fields.integer("moe_layer_freq", default=1) != 1:
        raise fields.fail("moe_layer_freq", "1 (experts in every layer after the dense ones)")
    heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", default=heads) != heads:
        raise fields.fail("num_key_value_heads", f"num_attention_heads ({heads}): all heads share one latent")
    if fields.values.get("quantization_config") is not None:
        raise ConfigError(
            f"{fields.source}: quantization_config is set; the weights must be stored as bf16, fp16 or fp32"
        )


def _check_consistent(fields: Fields, config: ModelConfig) -> None:
    per_group, rest = divmod(config.n_routed_experts, config.n_group)
    if rest:
        raise fields.fail("n_group", f"a divisor of n_routed_experts ({config.n_routed_experts})")
    if per_group < 2:
        raise fields.fail(
            "n_group", f"at most {config.n_routed_experts // 2}: a group scores by its two best experts"
        )
    if config.topk_group > config.n_group:
        raise fields.fail("topk_group", f"at most n_group ({config.n_group})")
    if config.num_experts_per_tok > config.topk_group * per_group:
        raise fields.fail(
            "num_experts_per_tok",
            f"at most {config.topk_group * per_group}, the experts of topk_group groups",
        )
    if config.qk_rope_head_dim % 2:
        raise fields.fail("qk_rope_head_dim", "even: rotary position turns pairs")
    for name, ids in (("bos_token_id", (config.bos_token_id,)), ("eos_token_id", config.eos_token_ids)):
        for token in ids:
            if token is not None and token >= config.vocab_size:
                raise ConfigError(
                    f"{fields.source}: {name} is {token}; it must be below vocab_size, {config.vocab_size}"
                )


def _rope_fields(fields: Fields) -> Fields:
    """The rotary settings: `rope_parameters` of transformers 5, or `rope_scaling` as DeepSeek publishes."""
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.values.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise fields.fail(name, "an object")
        return Fields(f"{fields.source}: {name}", value)
    return Fields(fields.source, {})


def _rope_theta(fields: Fields) -> float:
    nested = _rope_fields(fields)
    theta = nested.positive("rope_theta", default=fields.positive("rope_theta", default=10000.0))
    if theta <= 1:
        raise nested.fail("rope_theta", "above 1: the slowest pair would turn faster than the first")
    return theta


def _parse_yarn(fields: Fields) -> YarnConfig | None:
    nested = _rope_fields(fields)
    key = "rope_type" if nested.values.get("rope_type") is not None else "type"
    if nested.choice(key, ("default", "yarn"), default="default") == "default":
        return None
    context = fields.integer("max_position_embeddings")
    original = nested.integer("original_max_position_embeddings", default=context)
    return YarnConfig(
        factor=nested.positive("factor", default=context / original),
        original_context=original,
        beta_fast=nested.optional_positive("beta_fast") or 32.0,
        beta_slow=nested.optional_positive("beta_slow") or 1.0,
        mscale=nested.optional_positive("mscale"),
        mscale_all_dim=nested.optional_positive("mscale_all_dim"),
        attention_factor=nested.optional_positive("attention_factor"),
        truncate=nested.boolean("truncate", default=True),
    )
