"""Which files contain the weights of a checkpoint, and error messages for unsupported layouts."""

import re
from collections.abc import Collection
from pathlib import Path

from moe_worker.errors import CheckpointError
from moe_worker.reading import present

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Stored with a model for other programs; never part of it.
_OTHERS = ("consolidated*.safetensors", "adapter_model.safetensors")
_SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")
_FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)(_blocks|_scales)?$")
_FOREIGN: tuple[tuple[str, str], ...] = (
    (
        "consolidated*.safetensors",
        "Mistral's own layout, with other tensor names; use the Hugging Face layout (model-*.safetensors)",
    ),
    (
        "*.gguf",
        "a file for llama.cpp; use the safetensors checkpoint that it was made from",
    ),
    (
        "*.bin",
        "pickled PyTorch files, which can run code when they are read; convert them: load the model with "
        "transformers and call save_pretrained",
    ),
    (
        "*.pt*",
        "pickled PyTorch files, which can run code when they are read; convert them: load the model with "
        "transformers and call save_pretrained",
    ),
    (
        "adapter_model.safetensors",
        "a LoRA adapter; merge it into its base model (peft: merge_and_unload, save_pretrained)",
    ),
)


def shards_without_index(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint without SINGLE_FILE and INDEX_FILE, in order.

    Raises CheckpointError if there are none, or if one of a numbered set is missing.
    """
    others = {path for pattern in _OTHERS for path in directory.glob(pattern)}
    found = sorted(path for path in directory.glob("*.safetensors") if path not in others)
    if not found:
        raise CheckpointError(_no_weights(directory))
    for match in filter(None, (_SHARD.fullmatch(path.name) for path in found)):
        stem, count = match[1], int(match[3])
        numbers = {
            int(other[2])
            for other in filter(None, (_SHARD.fullmatch(path.name) for path in found))
            if other[1] == stem and int(other[3]) == count
        }
        if len(numbers) < count:
            missing = next(number for number in range(1, count + 1) if number not in numbers)
            name = f"{stem}-{missing:0{len(match[2])}}-of-{match[3]}.safetensors"
            raise CheckpointError(f"{directory / name} is missing, but {match[0]} is there; copy it too")
    return found


def _no_weights(directory: Path) -> str:
    for pattern, what in _FOREIGN:
        found = sorted(directory.glob(pattern))
        if found:
            return f"{directory} holds no weights that can be loaded: {found[0].name} is {what}"
    return (
        f"{directory} holds no weights; it must hold {SINGLE_FILE}, or shards (*.safetensors) with or "
        f"without {INDEX_FILE}"
    )


def check_names(directory: Path, names: Collection[str]) -> None:
    """Raises CheckpointError if tensor names belong to another layout than the family's own."""
    fused = next((name for name in names if _FUSED.search(name)), None)
    if fused is not None:
        raise CheckpointError(
            f"{directory} holds the experts of a layer in one tensor ({fused}), not one tensor an expert "
            "(experts.0.gate_proj.weight); load the model with transformers 5 and call "
            "save_pretrained, which writes them apart"
        )
    if names and not any(name.startswith("model.") for name in names):
        raise CheckpointError(
            f"{directory} holds tensors named as {min(names)}, not as in the Hugging Face layout "
            "(model.layers.0...); use the checkpoint in that layout, or convert it with the model's script"
        )


def no_tokenizer(directory: Path) -> str:
    """The error message for a missing tokenizer.json."""
    path = directory / "tokenizer.json"
    for name in ("tiktoken.model", "tokenizer.model", "vocab.json", "tekken.json"):
        if present(directory / name):
            return (
                f"{path} is missing, and {name} cannot be read in its place; write it once with "
                "transformers.AutoTokenizer.from_pretrained(DIRECTORY, "
                "trust_remote_code=True).backend_tokenizer.save('tokenizer.json'), or take tokenizer.json "
                "from a repository that has converted it"
            )
    return f"{path} is missing; a checkpoint directory holds the model's tokenizer"
