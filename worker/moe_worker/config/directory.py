"""Opens a checkpoint directory: is it one, and of which shape is its model?"""

import json
from pathlib import Path
from typing import Any

from moe_worker.config.fields import Fields
from moe_worker.config.model import ModelConfig, parse_model_config
from moe_worker.errors import CheckpointError


def read_model_config(path: Path) -> ModelConfig:
    """The configuration in a config.json file at `path`. Raises CheckpointError (ConfigError for a field)."""
    return parse_model_config(read_json(path), str(path))


def read_checkpoint_config(directory: Path) -> ModelConfig:
    """The configuration of the model in `directory`.

    End-of-text tokens come from generation_config.json where it names any, as in transformers.
    Raises CheckpointError (ConfigError for a field).
    """
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist; the model must be a checkpoint directory")
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is a file; the model must be the directory that holds config.json"
        )
    generation = directory / "generation_config.json"
    ends = Fields(str(generation), read_json(generation) if generation.exists() else {}).integers(
        "eos_token_id"
    )
    return parse_model_config(read_json(directory / "config.json"), str(directory / "config.json"), ends)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint directory holds {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # The first line: an integer of thousands of digits has a long story.
        raise CheckpointError(f"{path} is not valid JSON ({str(error)[:200]}); copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
