"""The model's configuration, from config.json of a published checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_worker.config.attention import (
    MOST_POSITIONS,
    AttentionConfig,
    LatentConfig,
    parse_grouped,
    parse_latent,
)
from moe_worker.config.fields import Fields
from moe_worker.config.moe import MoeConfig, parse_deepseek_moe, parse_qwen_moe
from moe_worker.config.quantization import Storage, parse_storage
from moe_worker.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are numbers of elements; the fields are named as in config.json if that name is clear.

    architecture: config.json's model_type. max_position_embeddings: the context length that the model was
    made for; with YaRN it can be above config.json's. dense_layers: those with one feed-forward block of
    `intermediate_size` instead of experts.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    dense_layers: frozenset[int]
    attention: AttentionConfig
    moe: MoeConfig
    storage: Storage | None
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def latent(self) -> LatentConfig:
        """The attention of a DeepSeek model. Raises ConfigError for another."""
        if not isinstance(self.attention, LatentConfig):
            raise ConfigError(f"this needs a model with latent attention; {self.architecture} has none")
        return self.attention

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts, in order."""
        return tuple(layer for layer in range(self.num_hidden_layers) if layer not in self.dense_layers)

    @property
    def parameters_total(self) -> int:
        """Trained weights of the model; tied embeddings count once, the routing bias does not count."""
        return self._parameters(self.moe.routed)

    @property
    def parameters_active(self) -> int:
        """Weights that one token uses: as the total, but only the chosen routed experts."""
        return self._parameters(self.moe.top_k)

    def _parameters(self, experts: int) -> int:
        d = self.hidden_size
        expert = 3 * d * self.moe.intermediate
        dense = 3 * d * self.intermediate_size
        moe = (experts + self.moe.shared) * expert + self.moe.routed * d
        layers = self.num_hidden_layers * (self.attention.parameters(d) + 2 * d)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * d
        return embeddings + layers + len(self.dense_layers) * dense + len(self.moe_layers) * moe + d


def parse_model_config(
    values: Mapping[str, Any], source: str, eos_token_ids: tuple[int, ...] = ()
) -> ModelConfig:
    """Checks the parsed config.json `values` once and freezes them.

    `source` is the file that messages name; `eos_token_ids`, if given (from generation_config.json), replace
    those of config.json. Raises ConfigError.
    """
    fields = Fields(source, values)
    architecture = fields.choice("model_type", tuple(_FAMILIES))
    fields.choice("hidden_act", ("silu",), default="silu")
    if fields.boolean("mlp_bias", default=False):
        raise fields.fail("mlp_bias", "false")
    parse_attention, parse_moe, parse_dense = _FAMILIES[architecture]
    attention = parse_attention(fields)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", least=2),
        hidden_size=fields.integer("hidden_size"),
        num_hidden_layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        intermediate_size=fields.integer("intermediate_size"),
        dense_layers=parse_dense(fields),
        attention=attention,
        moe=parse_moe(fields),
        storage=parse_storage(fields),
        rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        max_position_embeddings=_context(fields, attention),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        bos_token_id=fields.optional_integer("bos_token_id", least=0),
        eos_token_ids=eos_token_ids or fields.integers("eos_token_id"),
    )
    _check_tokens(fields, config)
    return config


# Ten times the deepest published model: no loop over layers runs for hours.
MOST_LAYERS = 1000


def _context(fields: Fields, attention: AttentionConfig) -> int:
    """Context length of the model, including the extension by YaRN.

    DeepSeek's max_position_embeddings is the extended length already. Qwen's stays what the model was trained
    with, and its model cards say that YaRN takes `factor` times original_max_position_embeddings.
    """
    positions = fields.integer("max_position_embeddings", most=MOST_POSITIONS)
    yarn = attention.rope.yarn
    if yarn is None or isinstance(attention, LatentConfig):
        return positions
    extended = yarn.original_context * yarn.factor  # infinite for a factor that is large enough
    if extended > MOST_POSITIONS:
        raise fields.fail("rope_scaling", f"a context of at most {MOST_POSITIONS} tokens: factor x original")
    return max(positions, int(extended))


def _deepseek_dense(fields: Fields) -> frozenset[int]:
    if fields.integer("moe_layer_freq", default=1) != 1:
        raise fields.fail("moe_layer_freq", "1 (experts in every layer after the dense ones)")
    layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    return frozenset(range(min(layers, fields.integer("first_k_dense_replace", default=0, least=0))))


def _qwen_dense(fields: Fields) -> frozenset[int]:
    layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    step, dense = fields.integer("decoder_sparse_step", default=1), fields.integers("mlp_only_layers")
    return frozenset(layer for layer in range(layers) if layer in dense or (layer + 1) % step)


_Family = tuple[
    Callable[[Fields], AttentionConfig], Callable[[Fields], MoeConfig], Callable[[Fields], frozenset[int]]
]
_FAMILIES: Mapping[str, _Family] = {
    "deepseek_v3": (parse_latent, lambda fields: parse_deepseek_moe(fields, "deepseek_v3"), _deepseek_dense),
    # The same architecture under another name: Kimi K2's code is DeepSeek's (configuration_deepseek.py).
    "kimi_k2": (parse_latent, lambda fields: parse_deepseek_moe(fields, "deepseek_v3"), _deepseek_dense),
    "deepseek_v2": (parse_latent, lambda fields: parse_deepseek_moe(fields, "deepseek_v2"), _deepseek_dense),
    "qwen3_moe": (parse_grouped, parse_qwen_moe, _qwen_dense),
}


def _check_tokens(fields: Fields, config: ModelConfig) -> None:
    for name, ids in (("bos_token_id", (config.bos_token_id,)), ("eos_token_id", config.eos_token_ids)):
        for token in ids:
            if token is not None and token >= config.vocab_size:
                raise ConfigError(
                    f"{fields.source}: {name} is {token}; it must be below vocab_size, {config.vocab_size}"
                )
