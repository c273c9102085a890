"""Opens a checkpoint directory and reads the configuration of its model."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_worker.config.fields import Fields
from moe_worker.config.model import ModelConfig, parse_model_config
from moe_worker.errors import CheckpointError
from moe_worker.reading import is_directory, present, read_file

# Ten times the largest published config.json; it takes a fifth of a second to parse.
LARGEST_CONFIG = 4 << 20
CONFIG, GENERATION, QUANTIZATION = "config.json", "generation_config.json", "hf_quant_config.json"


def read_model_config(path: Path) -> ModelConfig:
    """The configuration in a config.json file at `path`. Raises CheckpointError (ConfigError for a field)."""
    return parse_model_config(read_json(path), str(path))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory that `path` names: itself, or the snapshot in a model's Hugging Face cache.

    A cache directory models--OWNER--NAME holds snapshots/COMMIT, and refs/main names the commit. Raises
    CheckpointError if there is no directory, or if the snapshot is ambiguous.
    """
    _check_directory(path)
    if present(path / CONFIG):
        return path
    if is_directory(path / "snapshots"):
        return _snapshot(path)
    cached = sorted(entry.name for entry in path.glob("models--*") if entry.is_dir())
    if cached:
        raise CheckpointError(
            f"{path} is a Hugging Face cache of {len(cached)} models; give the directory of one, as "
            f"{path / cached[0]}"
        )
    return path


def _check_directory(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the model must be a checkpoint directory") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path} cannot be opened: {reason}; the model must be a checkpoint directory"
        ) from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is a file; the model must be the directory that holds {CONFIG}")


def _snapshot(path: Path) -> Path:
    main = path / "refs" / "main"
    if present(main):
        named = path / "snapshots" / Path(read_file(main, 4096).decode(errors="replace").strip()).name
        if is_directory(named):
            return named
    found = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir())
    if len(found) != 1:
        raise CheckpointError(
            f"{path} is a Hugging Face cache with {len(found)} snapshots, and refs/main names none of them; "
            "give one, as snapshots/COMMIT"
        )
    return found[0]


def read_checkpoint_config(directory: Path, override: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of the model in `directory`.

    End-of-text tokens come from generation_config.json if it names any, as in transformers. Fields in
    `override` replace those of config.json. Raises CheckpointError (ConfigError for a field).
    """
    _check_directory(directory)
    generation = directory / GENERATION
    ends = Fields(str(generation), read_json(generation) if present(generation) else {}).integers(
        "eos_token_id"
    )
    values = read_json(directory / CONFIG) | dict(override or {})
    _check_described(directory, values)
    return parse_model_config(values, str(directory / CONFIG), ends)


def _check_described(directory: Path, values: Mapping[str, Any]) -> None:
    """NVIDIA's ModelOpt describes its quantization in a separate file, and config.json may not mention it."""
    path = directory / QUANTIZATION
    if values.get("quantization_config") is not None or not present(path):
        return
    found = read_json(path).get("quantization")
    algorithm = found.get("quant_algo") if isinstance(found, dict) else None
    if algorithm is not None:
        raise CheckpointError(
            f"{path}: the weights are quantized as {str(algorithm)[:40]!r} by ModelOpt, which is not "
            "supported; use the checkpoint that they were made from, in BF16, in FP8 blocks or in "
            "compressed-tensors int4"
        )


def read_json(path: Path, most: int = LARGEST_CONFIG) -> dict[str, Any]:
    """The JSON object in `path`, at most `most` bytes. Raises CheckpointError if there is none."""
    try:
        value = json.loads(read_file(path, most))
    except (ValueError, RecursionError) as error:
        # Only the first line: the message for an integer of thousands of digits is long.
        raise CheckpointError(f"{path} is not valid JSON ({str(error)[:200]}); copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
