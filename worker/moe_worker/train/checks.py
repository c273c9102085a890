"""Checks of a configuration for this trainer, in addition to those of every configuration."""

from __future__ import annotations

from moe_worker.config import ModelConfig
from moe_worker.errors import ConfigError, SettingsError
from moe_worker.train.data import BOS_ID, EOS_ID
from moe_worker.train.settings import TrainSettings


def check_trainable(config: ModelConfig, settings: TrainSettings) -> None:
    """Refuses configurations that the training model would compute differently from the served one.

    Raises ConfigError if a field of the model's configuration cannot be trained here, SettingsError if
    windows are longer than the model's context, or a setting needs a mass that the configuration lacks.
    """
    problems = [
        (config.architecture != "deepseek_v3", "model_type", "deepseek_v3"),
        (config.attention.rope.yarn is not None, "rope_scaling", "null: positions are trained as they are"),
        (config.attention.attention_bias, "attention_bias", "false"),
        (not config.attention.rope.interleaved, "rope_interleave", "true"),
        (config.moe.shared < 1, "n_shared_experts", "1 or more"),
        (config.hidden_size % 8 != 0, "hidden_size", "a multiple of 8"),
        (config.moe.intermediate % 8 != 0, "moe_intermediate_size", "a multiple of 8"),
        (config.bos_token_id != BOS_ID, "bos_token_id", f"{BOS_ID}"),
        (config.eos_token_ids != (EOS_ID,), "eos_token_id", f"{EOS_ID}"),
    ]
    for wrong, field, allowed in problems:
        if wrong:
            raise ConfigError(f"{settings.config}: to be trained here, {field} must be {allowed}")
    if settings.window > config.max_position_embeddings:
        raise SettingsError(
            f"--window is {settings.window}; the model's max_position_embeddings allows "
            f"{config.max_position_embeddings} at most"
        )
    for flag, value in (("--expert-cost", settings.expert_cost), ("--mass-after", settings.mass_after)):
        if value and config.moe.routing.mass >= 1:
            raise SettingsError(
                f"{flag} is {value:g}, but {settings.config} has no routing.mass below 1, so each token "
                "keeps all of its experts; set a mass there, or leave the flag out"
            )
