"""Attention settings of config.json: latent (DeepSeek) or grouped queries (Qwen), and rotary positions."""

from dataclasses import dataclass

from moe_worker.config.fields import Fields

# Above any published context; a table of rotations has a row for each position.
MOST_POSITIONS = 1 << 24


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
class RopeConfig:
    """Rotary positions over `width` elements of a head.

    interleaved: an element is paired with its neighbour; otherwise with the one half the width further.
    """

    width: int
    theta: float
    interleaved: bool
    yarn: YarnConfig | None


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention; the fields are named as in config.json."""

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    rope: RopeConfig

    @property
    def qk_head_dim(self) -> int:
        """Elements of one head's query: the part without and the part with rotary position."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values in the cache for one token in one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def parameters(self, hidden: int) -> int:
        """Weights of one layer's attention."""
        latent, heads, rank = self.kv_lora_rank, self.num_attention_heads, self.q_lora_rank
        queries = heads * self.qk_head_dim
        query = hidden * queries if rank is None else hidden * rank + rank + rank * queries
        keys = hidden * self.cache_width + latent + latent * heads * (self.qk_nope_head_dim + self.v_head_dim)
        bias = ((rank or 0) + self.cache_width + hidden) if self.attention_bias else 0
        return query + keys + heads * self.v_head_dim * hidden + bias


@dataclass(frozen=True)
class GroupedConfig:
    """Grouped-query attention with normalised queries and keys; the fields are named as in config.json."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool
    rope: RopeConfig

    @property
    def cache_width(self) -> int:
        """Values in the cache for one token in one layer: keys and values of all key heads."""
        return 2 * self.num_key_value_heads * self.head_dim

    def parameters(self, hidden: int) -> int:
        """Weights of one layer's attention."""
        queries = self.num_attention_heads * self.head_dim
        bias = (queries + self.cache_width + hidden) if self.attention_bias else 0
        return hidden * (2 * queries + self.cache_width) + 2 * self.head_dim + bias


AttentionConfig = LatentConfig | GroupedConfig


def parse_latent(fields: Fields) -> LatentConfig:
    """DeepSeek's attention. Raises ConfigError."""
    heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", default=heads) != heads:
        raise fields.fail("num_key_value_heads", f"num_attention_heads ({heads}): all heads share one latent")
    width = fields.integer("qk_rope_head_dim", least=2)
    if width % 2:
        raise fields.fail("qk_rope_head_dim", "even: rotary positions rotate pairs")
    return LatentConfig(
        num_attention_heads=heads,
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=width,
        v_head_dim=fields.integer("v_head_dim"),
        attention_bias=fields.boolean("attention_bias", default=False),
        rope=_parse_rope(fields, width, fields.boolean("rope_interleave", default=True)),
    )


def parse_grouped(fields: Fields) -> GroupedConfig:
    """Qwen3's attention. Raises ConfigError."""
    heads = fields.integer("num_attention_heads")
    key_heads = fields.integer("num_key_value_heads", default=heads)
    if heads % key_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    width = fields.integer("head_dim", default=max(1, fields.integer("hidden_size") // heads))
    if width % 2:
        raise fields.fail("head_dim", "even: rotary positions rotate pairs")
    if fields.boolean("use_sliding_window", default=False):
        raise fields.fail("use_sliding_window", "false: attention goes over the whole context here")
    return GroupedConfig(
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width,
        attention_bias=fields.boolean("attention_bias", default=False),
        rope=_parse_rope(fields, width, interleaved=False),
    )


def _parse_rope(fields: Fields, width: int, interleaved: bool) -> RopeConfig:
    nested = _rope_fields(fields)
    theta = nested.positive("rope_theta", default=fields.positive("rope_theta", default=10000.0))
    if theta <= 1:
        raise nested.fail("rope_theta", "above 1: the slowest pair would rotate faster than the first")
    return RopeConfig(width, theta, interleaved, _parse_yarn(nested, fields))


def _rope_fields(fields: Fields) -> Fields:
    """The rotary settings: `rope_parameters` of transformers 5, or `rope_scaling` as DeepSeek publishes.

    Where both are set, rope_scaling counts, as in transformers, and adds the base of the other.
    """
    given: dict[str, dict[str, object]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.values.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise fields.fail(name, "an object")
        given[name] = value
    if not given:
        return Fields(fields.source, {})
    name = next(reversed(given))
    theta = given.get("rope_parameters", {}).get("rope_theta")
    return Fields(f"{fields.source}: {name}", {"rope_theta": theta} | given[name])


def _parse_yarn(nested: Fields, fields: Fields) -> YarnConfig | None:
    key = "rope_type" if nested.values.get("rope_type") is not None else "type"
    if nested.choice(key, ("default", "yarn"), default="default") == "default":
        return None
    context = fields.integer("max_position_embeddings", most=MOST_POSITIONS)
    original = nested.integer("original_max_position_embeddings", default=context, most=MOST_POSITIONS)
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
