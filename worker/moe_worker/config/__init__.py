"""Configuration: typed, frozen and validated once, at the edge. Imports no torch."""

from moe_worker.config.directory import read_checkpoint_config, read_model_config
from moe_worker.config.engine import EngineOptions
from moe_worker.config.model import ModelConfig, parse_model_config

__all__ = [
    "EngineOptions",
    "ModelConfig",
    "parse_model_config",
    "read_checkpoint_config",
    "read_model_config",
]
